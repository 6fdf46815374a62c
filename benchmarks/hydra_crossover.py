"""From which context on does Hydra take less time than attention of equal size?

    python -m benchmarks.hydra_crossover     measure on one thread what results/hydra_crossover.jsonl has no row of

`hydra_toy` (8 layers of width 256, attention to a window of 256 and 512 chosen tokens in two of them) against 8 layers
of softmax attention and SwiGLU with as many parameters; one row, float32, in turns. A training step is the loss of
every token and all gradients, with blocks recomputed in both; forward is a prefill with the last token's logits.

Expected beforehand, from the multiplications per token that `recallax show` counts and a scan that is bound by memory:
forward crosses at 4096 tokens or before, training at 4096; at 32,768 tokens Hydra takes a fifth of the time.
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
from recallax.layers import Attention, SwiGLU
from recallax.models import Block, LMConfig, accounting
from recallax.models.hydra import hydra_toy
from recallax.train.log import commit
from recallax.train.step import score
from recallax.types import DIAGNOSTIC, whole_rows

RESULTS = Path(__file__).parent / "results" / "hydra_crossover.jsonl"
LENGTHS = {"training step": (128, 256, 512, 1024, 2048, 4096, 8192), "forward": tuple(128 * 2**i for i in range(9))}
ROUNDS, ENOUGH = 3, 60.0
"""Turns of each, or fewer where they took so many seconds together."""
LAYERS, WIDTH = 8, 256


def attention_of_equal_size(hydra: LMConfig) -> LMConfig:
    """Softmax attention whose perceptrons are as wide as makes up for the parameters."""

    def model(inner: int) -> LMConfig:
        block = Block(mixer=Attention(heads=4), channel=SwiGLU(inner=inner))
        return replace(hydra, pattern=f"layer*{LAYERS}", blocks={"layer": block})

    wanted, least = accounting.parameters(hydra), accounting.parameters(model(1))
    each = accounting.parameters(model(2)) - least
    return model(1 + round((wanted - least) / each))


def main() -> None:
    hydra = replace(hydra_toy(), remat="block")
    arms = {"hydra": hydra, "attention": replace(attention_of_equal_size(hydra), remat="block")}
    sizes = {f"{name}_parameters": accounting.parameters(arm) for name, arm in arms.items()}
    sizes |= {f"{name}_active": accounting.active_parameters(arm) for name, arm in arms.items()}
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    measured = {(row["what"], row["tokens"]) for row in known}
    for what, lengths in LENGTHS.items():
        for length in lengths:
            if (what, length) in measured:
                continue
            calls = {name: CALLS[what](arm, length) for name, arm in arms.items()}
            row = {"what": what, "tokens": length, **measure(calls), **sizes}
            row |= {f"{name}_state_bytes": accounting.state_bytes(arm, length) for name, arm in arms.items()}
            row |= described() | {"jax": jax.__version__, "commit": commit()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({k: row[k] for k in ("what", "tokens", "hydra", "attention", "ratio", "ratios")}, flush=True)


def measure(calls: dict[str, Callable[[], None]]) -> dict:
    """Milliseconds of CPU, which other processes disturb least, and the ratio of attention to Hydra by rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    while len(seconds["hydra"]) < ROUNDS and sum(map(sum, seconds.values())) < ENOUGH:
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
    """Loss and gradients of one row, compiled."""
    graph, params, rest = nnx.split(config.build(nnx.Rngs(0)), nnx.Param, ...)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, length + 1)), jnp.int32)
    seq = whole_rows(1, length)

    def slopes(params: nnx.State) -> nnx.State:
        def loss(params: nnx.State) -> jax.Array:
            model = nnx.merge(graph, params, rest)
            projection, aux = model.project(tokens[:, :-1], seq)
            extra = [m.total / jnp.maximum(m.weight, 1e-9) for n, m in aux.items() if not n.startswith(DIAGNOSTIC)]
            return score(projection, tokens[:, 1:], jnp.full((1, length), 1 / length)).total + sum(extra)

        return jax.grad(loss)(params)

    return _compiled(slopes, params)


def forward(config: LMConfig, length: int) -> Callable[[], None]:
    """A prefill of one row with the last token's logits, compiled."""
    graph, weights = nnx.split(config.build(nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, length)), jnp.int32)
    seq, last = whole_rows(1, length), np.array([[length - 1]])

    def read(weights: nnx.State) -> tuple:
        model = nnx.merge(graph, weights)
        return model.prefill(tokens, seq, model.init_state(1, length), jnp.asarray(last))[:2]

    return _compiled(read, weights)


def _compiled(function: Callable, weights: nnx.State) -> Callable[[], None]:
    program = jax.jit(function).lower(weights).compile()
    return lambda: jax.block_until_ready(program(weights))


CALLS = {"training step": training_step, "forward": forward}

if __name__ == "__main__":
    main()
