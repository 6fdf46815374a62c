"""Measure from which context on Hydra takes less time than attention of equal size.

    python -m benchmarks.hydra_crossover     measure on one thread what results/hydra_crossover.jsonl has no row of

`hydra_toy` (8 layers of width 256, attention to a window of 256 and 512 chosen tokens in two of them) against 8 layers
of softmax attention and SwiGLU with as many parameters; one row, float32, run alternately. A training step is the loss
of every token and all gradients, with blocks recomputed in both; forward is a prefill with the last token's logits.

Expected beforehand, from the multiplications per token that `recallax show` counts and a scan that is bound by memory:
forward crosses at 4096 tokens or before, training at 4096; at 32,768 tokens Hydra takes a fifth of the time.
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
from recallax.layers import Attention, SwiGLU
from recallax.models import Block, LMConfig, accounting
from recallax.models.hydra_lm import hydra_toy
from recallax.train.log import git_commit
from recallax.train.step import score
from recallax.types import DIAGNOSTIC_PREFIX, unpacked_seq_info

DESCRIPTION = (__doc__ or "").split("\n")[0]
RESULTS = Path(__file__).parent / "results" / "hydra_crossover.jsonl"
LENGTHS = {"training step": (128, 256, 512, 1024, 2048, 4096, 8192), "forward": tuple(128 * 2**i for i in range(9))}
ROUNDS, MAX_SECONDS = 3, 60.0
"""Runs of each, or fewer where they took so many seconds together."""
LAYERS, WIDTH = 8, 256


def attention_of_equal_size(hydra: LMConfig) -> LMConfig:
    """Return a model of softmax attention with as many parameters as Hydra, by the width of its perceptrons.

    Args:
        hydra: Gives the number of parameters, the width and the vocabulary.
    """

    def model(inner: int) -> LMConfig:
        block = Block(mixer=Attention(num_heads=4), channel=SwiGLU(intermediate_size=inner))
        return replace(hydra, pattern=f"layer*{LAYERS}", blocks={"layer": block})

    target, least = accounting.count_parameters(hydra), accounting.count_parameters(model(1))
    step = accounting.count_parameters(model(2)) - least
    return model(1 + round((target - least) / step))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hydra_crossover", description=DESCRIPTION)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    args = parser.parse_args(argv)
    one_thread()
    hydra = replace(hydra_toy(), remat="block")
    variants = {"hydra": hydra, "attention": replace(attention_of_equal_size(hydra), remat="block")}
    sizes = {f"{name}_parameters": accounting.count_parameters(variant) for name, variant in variants.items()}
    sizes |= {f"{name}_active": accounting.count_active_parameters(variant) for name, variant in variants.items()}
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    measured = {(row["what"], row["tokens"]) for row in known}
    for what, lengths in LENGTHS.items():
        for length in lengths:
            if (what, length) in measured:
                continue
            calls = {name: PROGRAMS[what](variant, length) for name, variant in variants.items()}
            row = {"what": what, "tokens": length, **measure(calls), **sizes}
            row |= {
                f"{name}_state_bytes": accounting.state_bytes(variant, length) for name, variant in variants.items()
            }
            row |= describe_machine() | {"jax": jax.__version__, "commit": git_commit()}
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({k: row[k] for k in ("what", "tokens", "hydra", "attention", "ratio", "ratios")}, flush=True)


def measure(calls: dict[str, Callable[[], None]]) -> dict:
    """Run Hydra and attention alternately, by CPU time, which other processes disturb least.

    Args:
        calls: Compiled calls of `hydra` and `attention`.

    Returns:
        Milliseconds of each, and the ratio of attention to Hydra by rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    while len(seconds["hydra"]) < ROUNDS and sum(map(sum, seconds.values())) < MAX_SECONDS:
        for name, call in calls.items():
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    ratios = [a / h for a, h in zip(seconds["attention"], seconds["hydra"], strict=True)]
    found: dict = {name: {"ms": round(1e3 * statistics.median(taken), 1)} for name, taken in seconds.items()}
    return found | {
        "rounds": len(ratios),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def training_step(config: LMConfig, length: int) -> Callable[[], None]:
    """Compile the loss and the gradients of one row.

    Args:
        config: The model.
        length: Tokens.

    Returns:
        The call.
    """
    graph, params, rest = nnx.split(config.build(nnx.Rngs(0)), nnx.Param, ...)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, length + 1)), jnp.int32)
    seq = unpacked_seq_info(1, length)

    def gradients(params: nnx.State) -> nnx.State:
        def loss(params: nnx.State) -> jax.Array:
            model = nnx.merge(graph, params, rest)
            projection, aux = model.logit_projection(tokens[:, :-1], seq)
            extra = [
                m.total / jnp.maximum(m.weight, 1e-9) for n, m in aux.items() if not n.startswith(DIAGNOSTIC_PREFIX)
            ]
            return score(projection, tokens[:, 1:], jnp.full((1, length), 1 / length)).total + sum(extra)

        return jax.grad(loss)(params)

    return _compile(gradients, params)


def forward(config: LMConfig, length: int) -> Callable[[], None]:
    """Compile a prefill of one row with the last token's logits.

    Args:
        config: The model.
        length: Tokens.

    Returns:
        The call.
    """
    graph, weights = nnx.split(config.build(nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, length)), jnp.int32)
    seq, last = unpacked_seq_info(1, length), np.array([[length - 1]])

    def read(weights: nnx.State) -> tuple:
        model = nnx.merge(graph, weights)
        return model.prefill(tokens, seq, model.init_state(1, length), jnp.asarray(last))[:2]

    return _compile(read, weights)


def _compile(function: Callable, weights: nnx.State) -> Callable[[], None]:
    program = jax.jit(function).lower(weights).compile()
    return lambda: jax.block_until_ready(program(weights))


PROGRAMS = {"training step": training_step, "forward": forward}

if __name__ == "__main__":
    main()
