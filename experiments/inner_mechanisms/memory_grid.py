"""A grid of inner learning rates and gates in one call of `neural_memory`, with one head per setting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory

LOG_CLOSED = -1e4
"""Logarithm of a closed gate."""


class MemoryGates(NamedTuple):
    """Gates of every token and setting, equal for all matrices of a memory."""

    lr: Float[np.ndarray, "B T H"]
    log_momentum: Float[np.ndarray, "B T H"]
    log_keep: Float[np.ndarray, "B T H"]


def run_memory(
    inner_optimizer: InnerOptimizer,
    q: Float[np.ndarray, "B T D"],
    k: Float[np.ndarray, "B T D"],
    v: Float[np.ndarray, "B T D"],
    gates: MemoryGates,
    weights: dict[str, Float[np.ndarray, "I O"]],
) -> tuple[Float[np.ndarray, "B T H D"], dict[str, Float[np.ndarray, "B H I O"]]]:
    """Run a memory with every setting on the same rows and from the same weights, in float32.

    Args:
        inner_optimizer: The memory's inner optimizer.
        q: Queries.
        k: Keys.
        v: Values.
        gates: Gates of every setting H.
        weights: Initial weights by name.

    Returns:
        The outputs of every setting, and the change of each matrix at the end, float64.
    """
    (b, t, d), heads, layers = q.shape, gates.lr.shape[-1], len(inner_optimizer.trainable_shapes(q.shape[-1]))

    def per_head(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(x[:, :, None], (b, t, heads, d)), jnp.float32)

    def per_matrix(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(x[..., None], (b, t, heads, layers)), jnp.float32)

    start = {n: jnp.asarray(np.broadcast_to(w, (heads, *w.shape)), jnp.float32) for n, w in weights.items()}
    fixed = OuterParams(start, jnp.ones((heads, d)), jnp.zeros((heads, d)))
    tokens = MemoryInputs(*(per_head(x) for x in (q, k, v)), *(per_matrix(x) for x in gates))
    out, state = jax.jit(lambda tokens, fixed: neural_memory(inner_optimizer, tokens, fixed))(tokens, fixed)
    return np.asarray(out, np.float64), {n: np.asarray(x, np.float64) for n, x in state.fast_weights.delta.items()}


def l2_normalize(x: Float[np.ndarray, "... D"]) -> Float[np.ndarray, "... D"]:
    """Scale vectors to unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def select_setting(scores: Float[np.ndarray, "B H"], reduce: np.ufunc) -> tuple[int, float]:
    """Select the best setting on the first half of the rows, and measure it on the second half.

    Args:
        scores: Scores by row and setting; values that are not finite, from a memory that diverged, are worst.
        reduce: np.minimum if low scores are best, np.maximum if high scores are.

    Returns:
        The index of the setting, and its mean score on the second half of the rows.
    """
    half = len(scores) // 2
    sign = 1 if reduce is np.minimum else -1
    means = sign * scores[:half].mean(axis=0)
    index = int(np.argmin(np.where(np.isfinite(means), means, np.inf)))
    return index, float(scores[half:, index].mean())
