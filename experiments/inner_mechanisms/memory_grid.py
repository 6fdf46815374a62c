"""One head per setting: how a grid of inner learning rates and gates is measured in one call of `neural_memory`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from recallax.pallas_kernels.neural_memory import InnerOptimizer, MemoryInputs, OuterParams, neural_memory

LOG_CLOSED = -1e4
"""The logarithm of a gate that is shut."""


class MemoryGates(NamedTuple):
    """Of every setting, for all matrices of its memory alike."""

    lr: Float[np.ndarray, "B T H"]
    log_momentum: Float[np.ndarray, "B T H"]
    log_keep: Float[np.ndarray, "B T H"]


def run_memory(
    learner: InnerOptimizer,
    q: Float[np.ndarray, "B T D"],
    k: Float[np.ndarray, "B T D"],
    v: Float[np.ndarray, "B T D"],
    gates: MemoryGates,
    weights: dict[str, Float[np.ndarray, "I O"]],
) -> tuple[Float[np.ndarray, "B T H D"], dict[str, Float[np.ndarray, "B H I O"]]]:
    """What every setting reads, and what it has learned at the end: the change of each matrix from `weights`.

    All settings see the same rows and start from the same weights. float32 in the op, float64 in what is returned.
    """
    (b, t, d), heads, layers = q.shape, gates.lr.shape[-1], len(learner.trainable_shapes(q.shape[-1]))

    def per_head(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(x[:, :, None], (b, t, heads, d)), jnp.float32)

    def per_matrix(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(x[..., None], (b, t, heads, layers)), jnp.float32)

    start = {n: jnp.asarray(np.broadcast_to(w, (heads, *w.shape)), jnp.float32) for n, w in weights.items()}
    fixed = OuterParams(start, jnp.ones((heads, d)), jnp.zeros((heads, d)))
    tokens = MemoryInputs(*(per_head(x) for x in (q, k, v)), *(per_matrix(x) for x in gates))
    out, state = jax.jit(lambda tokens, fixed: neural_memory(learner, tokens, fixed))(tokens, fixed)
    return np.asarray(out, np.float64), {n: np.asarray(x, np.float64) for n, x in state.fast_weights.delta.items()}


def l2_normalize(x: Float[np.ndarray, "... D"]) -> Float[np.ndarray, "... D"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def select_setting(scores: Float[np.ndarray, "B H"], reduce: np.ufunc) -> tuple[int, float]:
    """The setting that is best (np.minimum or np.maximum) on the first half of the rows, and its mean on the second.

    What is not finite, a memory that diverged, is worst.
    """
    half = len(scores) // 2
    sign = 1 if reduce is np.minimum else -1
    tuned = sign * scores[:half].mean(axis=0)
    index = int(np.argmin(np.where(np.isfinite(tuned), tuned, np.inf)))
    return index, float(scores[half:, index].mean())
