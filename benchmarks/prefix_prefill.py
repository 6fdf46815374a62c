"""Prefill of BASED that reads a prompt's prefix twice against BASED that reads it once, and against repeated prompts.

    python -m benchmarks.prefix_prefill     measure on one thread, and append rows to results/prefix_prefill.jsonl

The linear attention layer of the 360M models (width 1024, 16 heads, d' = 16), and four layers with their pattern
`conv based window conv`; 2048 tokens, of which 1024 or all are prefix; float32, run alternately. JRT-Prompt is BASED
on the prefix twice and the rest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machine import describe_machine, one_thread
from recallax.layers import PrefixLinear
from recallax.models import LMConfig, based_lm, jrt_rnn_lm
from recallax.train.log import git_commit
from recallax.types import unpacked_seq_info

DESCRIPTION = (__doc__ or "").split("\n")[0]
RESULTS = Path(__file__).parent / "results" / "prefix_prefill.jsonl"
LENGTH, ROUNDS, VOCAB = 2048, 7, 64
PATTERNS = {"layer": "based", "four layers": "conv based window conv"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix_prefill", description=DESCRIPTION)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    args = parser.parse_args(argv)
    one_thread()
    for pattern in PATTERNS:
        for prefix in (LENGTH // 2, LENGTH):
            row = measure(pattern, prefix) | describe_machine() | {"jax": jax.__version__, "commit": git_commit()}
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def measure(name: str, prefix: int) -> dict:
    """Measure the three variants alternately, by CPU time, which other processes disturb least.

    Args:
        name: A key of `PATTERNS`.
        prefix: Tokens that are read twice.

    Returns:
        A row: milliseconds of each variant, and their ratios to reading the prompt once.
    """
    variants = {variant: compile_prefill(*arguments) for variant, arguments in prefills(name, prefix).items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(ROUNDS):
        for variant, call in variants.items():
            begin = time.process_time()
            call()
            seconds[variant].append(time.process_time() - begin)
    found: dict = {"what": name, "tokens": LENGTH, "prefix_tokens": prefix}
    for variant, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["causal"], strict=True)]
        found[variant] = {"ms": round(1e3 * statistics.median(taken), 1), "min_ms": round(1e3 * min(taken), 1)}
        found[variant]["times_causal"] = round(min(taken) / min(seconds["causal"]), 2)
        found[variant]["ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return found


def prefills(name: str, prefix: int) -> dict[str, tuple[LMConfig, int, int]]:
    """Return the variants' arguments of `compile_prefill`, by name.

    Args:
        name: A key of `PATTERNS`.
        prefix: Tokens that are read twice.
    """
    once, twice = (
        replace(model, pattern=PATTERNS[name], vocab_size=VOCAB, compute_dtype="float32")
        for model in (based_lm.based_360m(), jrt_rnn_lm.jrt_rnn_360m())
    )
    mixer = twice.blocks["based"].mixer
    assert isinstance(mixer, PrefixLinear)
    block = replace(twice.blocks["based"], mixer=replace(mixer, max_prefix_len=prefix))
    return {
        "causal": (once, LENGTH, 0),
        "prefix": (replace(twice, blocks=twice.blocks | {"based": block}), LENGTH, prefix),
        "prompt": (once, LENGTH + prefix, 0),
    }


def compile_prefill(config: LMConfig, length: int, prefix: int) -> Callable[[], None]:
    """Compile a prefill of one row, with the last token's logits, and call it once.

    Args:
        config: The model.
        length: Tokens.
        prefix: Tokens that a model with a prefix reads twice.

    Returns:
        The call.
    """
    model = config.build(nnx.Rngs(0))
    graph, weights = nnx.split(model)
    tokens = np.arange(length, dtype=np.int32)[None] % VOCAB
    seq, last = unpacked_seq_info(1, length, prefix), np.array([[length - 1]])

    @jax.jit
    def run(weights: nnx.State) -> tuple:
        model = nnx.merge(graph, weights)
        return model.prefill(jnp.asarray(tokens), seq, model.init_state(1, length), jnp.asarray(last))[:2]

    def call() -> None:
        jax.block_until_ready(run(weights))

    call()
    return call


if __name__ == "__main__":
    main()
