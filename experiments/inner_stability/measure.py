"""Measure the largest inner learning rate at which a linear memory stays bounded.

`python -m experiments.inner_stability.measure` rewrites results.jsonl. No model is trained: the memory's own gradient
descent, inside `neural_memory`, is what is measured.
"""

from itertools import product
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet
from recallax.sweep import write_results
from recallax.train.log import git_commit

type GradientMode = Literal["token", "chunk_start"]

FOLDER = Path(__file__).parent
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CHUNKS = (1, 4, 16, 64)
COSINES = (0.0, 0.3, 0.7)
MOMENTA = (0.0, 0.9)
GRADIENTS: tuple[GradientMode, ...] = ("token", "chunk_start")
WIDTH, LENGTH = 64, 1024
DIVERGENCE_BOUND = 100.0
"""Largest absolute output of a memory that counts as bounded; with unit keys and values the output is about 1."""


def largest_stable_rate(gradient: GradientMode, chunk: int, cosine: float, momentum: float, seed: int = 0) -> float:
    """Measure one setting, with one head per learning rate.

    Args:
        gradient: The weights at which gradients are taken: the token's own or those at the start of the chunk.
        chunk: Tokens of a chunk.
        cosine: Mean cosine between two keys.
        momentum: Momentum coefficient; 0 switches momentum off.
        seed: Seed of keys and values.

    Returns:
        The largest of `RATES` up to which all of them keep the output below `DIVERGENCE_BOUND`; 0 if none does.
    """
    rng, heads = np.random.default_rng(seed), len(RATES)
    shared = rng.normal(size=WIDTH)
    k = np.sqrt(1 - cosine) * rng.normal(size=(LENGTH, WIDTH)) + np.sqrt(cosine) * shared
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(LENGTH, WIDTH)) / np.sqrt(WIDTH)
    keys, values = (
        jnp.asarray(np.broadcast_to(x[None, :, None], (1, LENGTH, heads, WIDTH)), jnp.float32) for x in (k, v)
    )
    lr = jnp.broadcast_to(jnp.asarray(RATES)[None, None, :, None], (1, LENGTH, heads, 1))
    log_momentum = jnp.full_like(lr, np.log(max(momentum, 1e-30)))
    tokens = MemoryInputs(keys, keys, values, lr, log_momentum, jnp.zeros_like(lr))
    no_norm = jnp.zeros((heads, WIDTH))
    inner_optimizer = InnerOptimizer(network=LinearNet(), momentum=momentum > 0, gradient=gradient, chunk_size=chunk)
    fixed = OuterParams({"w1": jnp.zeros((heads, WIDTH, WIDTH))}, no_norm, no_norm)
    out, _ = jax.jit(lambda tokens: neural_memory(inner_optimizer, tokens, fixed))(tokens)
    size = np.abs(np.asarray(out)[0]).max(axis=(0, 2))
    bounded = np.isfinite(size) & (size < DIVERGENCE_BOUND)
    return max((rate for i, rate in enumerate(RATES) if bounded[: i + 1].all()), default=0.0)


def main() -> None:
    """Measure every gradient mode, cosine of the keys, momentum and chunk size."""
    rows = []
    for gradient, cosine, momentum in product(GRADIENTS, COSINES, MOMENTA):
        largest = {chunk: largest_stable_rate(gradient, chunk, cosine, momentum) for chunk in CHUNKS}
        rows.append(
            {"gradient": gradient, "cosine": cosine, "momentum": momentum, "largest": largest, "commit": git_commit()}
        )
        print(rows[-1], flush=True)
    write_results(rows, FOLDER)


if __name__ == "__main__":
    main()
