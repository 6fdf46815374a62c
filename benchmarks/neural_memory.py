"""The dual form of the neural memory against the primal one, which holds a gradient matrix per token, in one process.

    python -m benchmarks.neural_memory      measure on one thread, and append a row to results/neural_memory.jsonl

Forward with backward to every input, float32, a two-layer memory; nothing is timed before both agree.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ |= {"PJRT_NPROC": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import described
from recallax.pallas_kernels.neural_memory import Fixed, Learner, Tokens, neural_memory
from recallax.pallas_kernels.neural_memory.learner import MLPNet
from recallax.train.log import commit

RESULTS = Path(__file__).parent / "results" / "neural_memory.jsonl"
ROWS, LENGTH, HEADS, WIDTH, CHUNK = 1, 256, 1, 64, 64
ROUNDS = 7


def main() -> None:
    learner = Learner(network=MLPNet(depth=2, expansion=4), chunk=CHUNK)
    tokens, fixed = draw(learner)
    calls, held, results = {}, {}, {}
    for form in ("xla", "primal"):

        def loss(tokens: Tokens, fixed: Fixed, form: str = form) -> Any:
            return jnp.sum(jnp.sin(neural_memory(learner, tokens, fixed, implementation=form)[0]))

        calls[form] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(tokens, fixed).compile()
        memory = calls[form].memory_analysis()
        held[form] = memory.temp_size_in_bytes if memory else 0
        results[form] = calls[form](tokens, fixed)
    error = max(
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3))
        for a, b in zip(*(jax.tree.leaves(results[form]) for form in calls), strict=True)
    )
    assert error < 1e-3, error
    seconds: dict[str, list[float]] = {form: [] for form in calls}
    for _ in range(ROUNDS):
        for form, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(tokens, fixed))
            seconds[form].append(time.perf_counter() - begin)
    row = {
        "rows": ROWS,
        "tokens": LENGTH,
        "heads": HEADS,
        "width": WIDTH,
        "hidden": 4 * WIDTH,
        "chunk": CHUNK,
        "error": error,
        **{f"{form}_ms": round(1e3 * statistics.median(x), 2) for form, x in seconds.items()},
        **{f"{form}_min_ms": round(1e3 * min(x), 2) for form, x in seconds.items()},
        **{f"{form}_bytes": n for form, n in held.items()},
        "times_faster": round(
            statistics.median(p / d for p, d in zip(seconds["primal"], seconds["xla"], strict=True)), 1
        ),
        "times_smaller": round(held["primal"] / held["xla"], 1),
        **described(),
        "jax": jax.__version__,
        "commit": commit(),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


def draw(learner: Learner) -> tuple[Tokens, Fixed]:
    """Unit queries and keys, gates as at the beginning of training."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, ROWS, LENGTH, HEADS, WIDTH))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    gate = (ROWS, LENGTH, HEADS, len(learner.learned(WIDTH)))
    gates = (rng.uniform(0, 0.01, gate), np.log(rng.uniform(0.3, 0.7, gate)), np.log(rng.uniform(0.98, 1, gate)))
    weights = {n: rng.normal(size=(HEADS, *s)) / np.sqrt(s[0]) for n, s in learner.network.shapes(WIDTH).items()}
    norm = (np.ones((HEADS, WIDTH)), np.zeros((HEADS, WIDTH)))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (Tokens(q, k, v, *gates), Fixed(weights, *norm)))  # pyright: ignore


if __name__ == "__main__":
    main()
