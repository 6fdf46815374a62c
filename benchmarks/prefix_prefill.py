"""Prefill of BASED that reads a prompt's prefix twice against BASED that reads it once, and against repeated prompts.

    python -m benchmarks.prefix_prefill     measure on one thread, and append rows to results/prefix_prefill.jsonl

The linear attention layer of the 360M models (width 1024, 16 heads, d' = 16), and four layers with their pattern
`conv based window conv`; 2048 tokens, of which 1024 or all are prefix; float32, in turns. JRT-Prompt is BASED on the
prefix twice and the rest.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ |= {"PJRT_NPROC": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machine import described
from recallax.layers import Prefix
from recallax.models import LMConfig, based, jrt_rnn
from recallax.train.log import commit
from recallax.types import whole_rows

RESULTS = Path(__file__).parent / "results" / "prefix_prefill.jsonl"
LENGTH, ROUNDS = 2048, 7
PATTERNS = {"layer": "based", "four layers": "conv based window conv"}


def main() -> None:
    for pattern in PATTERNS:
        for prefix in (LENGTH // 2, LENGTH):
            row = measure(pattern, prefix) | described() | {"jax": jax.__version__, "commit": commit()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def measure(name: str, prefix: int) -> dict:
    """Milliseconds of CPU of each arm, which other processes disturb least, and their ratios to reading once."""
    once, twice = (
        replace(model, pattern=PATTERNS[name], vocab_size=64, compute="float32")
        for model in (based.based_360m(), jrt_rnn.jrt_rnn_360m())
    )
    mixer = twice.blocks["based"].mixer
    assert isinstance(mixer, Prefix)
    block = replace(twice.blocks["based"], mixer=replace(mixer, max_prefix=prefix))
    arms = {
        "causal": prefill(once, LENGTH, 0),
        "prefix": prefill(replace(twice, blocks=twice.blocks | {"based": block}), LENGTH, prefix),
        "prompt": prefill(once, LENGTH + prefix, 0),
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(ROUNDS):
        for arm, call in arms.items():
            begin = time.process_time()
            call()
            seconds[arm].append(time.process_time() - begin)
    found: dict = {"what": name, "tokens": LENGTH, "prefix_tokens": prefix}
    for arm, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["causal"], strict=True)]
        found[arm] = {"ms": round(1e3 * statistics.median(taken), 1), "min_ms": round(1e3 * min(taken), 1)}
        found[arm]["times_causal"] = round(min(taken) / min(seconds["causal"]), 2)
        found[arm]["by_turns"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return found


def prefill(config: LMConfig, length: int, prefix: int) -> Callable[[], None]:
    """One compiled prefill of a row, with the last token's logits; called once already."""
    model = config.build(nnx.Rngs(0))
    graph, weights = nnx.split(model)
    tokens = np.arange(length, dtype=np.int32)[None] % 64
    seq, last = whole_rows(1, length, prefix), np.array([[length - 1]])

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
