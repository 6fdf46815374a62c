"""Compare the chunked neural memory with the implementation that materializes a gradient matrix per token.

    python -m benchmarks.neural_memory_speed      measure on one thread, and append a row to results/neural_memory.jsonl

Forward with backward to every input, float32, a two-layer memory; nothing is timed before both agree.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe_machine, one_thread
from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory
from recallax.pallas_kernels.neural_memory.inner_optimizer import MLPNet
from recallax.train.log import git_commit

DESCRIPTION = (__doc__ or "").split("\n")[0]
RESULTS = Path(__file__).parent / "results" / "neural_memory.jsonl"
ROWS, LENGTH, HEADS, WIDTH, CHUNK = 1, 256, 1, 64, 64
ROUNDS = 7
ALLOWED = 1e-3
"""Difference of an output or gradient, relative to its largest entry."""


class Disagreement(RuntimeError):
    """The two implementations do not compute the same."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neural_memory_speed", description=DESCRIPTION)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are appended to")
    args = parser.parse_args(argv)
    one_thread()
    row = measure() | describe_machine() | {"jax": jax.__version__, "commit": git_commit()}
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


def measure() -> dict[str, Any]:
    """Compare the chunked implementation with the materialized one.

    Returns:
        A row: milliseconds and bytes of each, and their ratios.

    Raises:
        Disagreement: The two do not compute the same.
    """
    learner = InnerOptimizer(network=MLPNet(depth=2, expansion=4), chunk_size=CHUNK)
    tokens, fixed = draw_inputs(learner)
    calls, held, results = {}, {}, {}
    for implementation in ("xla", "materialized"):

        def loss(tokens: MemoryInputs, fixed: OuterParams, implementation: str = implementation) -> Any:
            return jnp.sum(jnp.sin(neural_memory(learner, tokens, fixed, implementation=implementation)[0]))

        calls[implementation] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(tokens, fixed).compile()
        memory = calls[implementation].memory_analysis()
        held[implementation] = memory.temp_size_in_bytes if memory else 0
        results[implementation] = calls[implementation](tokens, fixed)
    error = max(
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3))
        for a, b in zip(*(jax.tree.leaves(results[implementation]) for implementation in calls), strict=True)
    )
    if not error < ALLOWED:
        raise Disagreement(f"outputs or gradients differ by {error:.1e}, allowed {ALLOWED:.0e}; they are not timed")
    seconds: dict[str, list[float]] = {implementation: [] for implementation in calls}
    for _ in range(ROUNDS):
        for implementation, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(tokens, fixed))
            seconds[implementation].append(time.perf_counter() - begin)
    return {
        "rows": ROWS,
        "tokens": LENGTH,
        "heads": HEADS,
        "width": WIDTH,
        "hidden": 4 * WIDTH,
        "chunk": CHUNK,
        "error": error,
        **{f"{implementation}_ms": round(1e3 * statistics.median(x), 2) for implementation, x in seconds.items()},
        **{f"{implementation}_min_ms": round(1e3 * min(x), 2) for implementation, x in seconds.items()},
        **{f"{implementation}_bytes": n for implementation, n in held.items()},
        "times_faster": round(
            statistics.median(p / d for p, d in zip(seconds["materialized"], seconds["xla"], strict=True)), 1
        ),
        "times_smaller": round(held["materialized"] / held["xla"], 1),
    }


def draw_inputs(learner: InnerOptimizer) -> tuple[MemoryInputs, OuterParams]:
    """Draw the inputs: unit queries and keys, gates as at the beginning of training.

    Args:
        learner: The memory.

    Returns:
        What differs per token, and what does not.
    """
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, ROWS, LENGTH, HEADS, WIDTH))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    gate = (ROWS, LENGTH, HEADS, len(learner.trainable_shapes(WIDTH)))
    gates = (rng.uniform(0, 0.01, gate), np.log(rng.uniform(0.3, 0.7, gate)), np.log(rng.uniform(0.98, 1, gate)))
    weights = {n: rng.normal(size=(HEADS, *s)) / np.sqrt(s[0]) for n, s in learner.network.shapes(WIDTH).items()}
    norm = (np.ones((HEADS, WIDTH)), np.zeros((HEADS, WIDTH)))
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ((q, k, v, *gates), (weights, *norm)))
    return MemoryInputs(*arrays[0]), OuterParams(*arrays[1])


if __name__ == "__main__":
    main()
