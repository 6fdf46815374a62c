"""The linear memory with a gradient per token: what its kernels and its XLA form share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.update_coefficients import MemoryInputs, OuterParams, UpdateCoefficients


def require_sequential(inner_optimizer: InnerOptimizer, outer_params: OuterParams) -> None:
    """Raise Unsupported for what no kernel takes."""
    if inner_optimizer.gradient == "chunk_start":
        raise Unsupported("gradients are taken at the chunk's start; the kernel takes them per token")
    if outer_params.initial_fast_weights is not None:
        raise Unsupported("documents begin with something learned; the kernel begins them with the initial weights")


def subtract_initial_weights(
    inner_optimizer: InnerOptimizer,
    initial_weights: Float[Array, "H I O"],
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    document_starts: Bool[Array, "B T"],
) -> tuple[Array, Float[Array, "B T H O"], Float[Array, "B H I O"]]:
    """Targets as the change of the weights alone meets them; what reading the initial weights adds to the outputs; and
    what is added to the final change.

    The weights hold b_t times the initial ones, b = 1 unless they decay to zero: then the product of keep since the
    document's first token, or the first of these.
    """
    read, known = (einsum_f32("bthi,hio->btho", x, initial_weights.astype(x.dtype)) for x in (q, k))
    if inner_optimizer.decay_to == "init":
        return (
            (v.astype(jnp.float32) - known).astype(v.dtype),
            read,
            jnp.zeros((q.shape[0], *initial_weights.shape), jnp.float32),
        )
    total = jnp.cumsum(log_decay, axis=1)
    first = jax.lax.cummin(jnp.where(document_starts[..., None, None], total - log_decay, 0), axis=1)
    now, ahead = jnp.exp(total - first), jnp.exp(total - log_decay - first)
    seen = now if inner_optimizer.gradient == "token_decayed" else ahead
    left = (jnp.moveaxis(now[:, -1:], 1, 2) - 1) * initial_weights[None]
    return (v.astype(jnp.float32) - seen * known).astype(v.dtype), now * read, left


def shifted_coefficients(
    inner_optimizer: InnerOptimizer,
    tokens: MemoryInputs,
    coefficients: UpdateCoefficients,
    visible: Bool[Array, "B C C"],
) -> tuple[Float[Array, "B H C"], Float[Array, "B H C"], Float[Array, "B H C C"]]:
    """`carried`, `momentum` and `gradients` as a token's own gradient meets them, where one matrix learns from
    gradients per token: those of the token before it in its document, and nothing but the found ones at its start.

    weighing: without the axis of the matrices.
    """
    before = visible & ~jnp.eye(visible.shape[1], dtype=bool)[None]
    first = (~before.any(axis=-1))[:, None]
    beta = jnp.where(first, 1.0, _shift_time(coefficients.initial_weights, 1.0))
    f = jnp.where(first, 0.0, _shift_time(coefficients.initial_momentum, 0.0))
    g = jnp.where(before[:, None], _shift_time(coefficients.gradients, 0.0), 0)
    if inner_optimizer.gradient != "token_decayed":
        return beta, f, g
    keep = jnp.exp(jnp.moveaxis(tokens.log_decay[..., 0].astype(jnp.float32), 1, 2))
    return beta * keep, f * keep, g * keep[..., None]


def _shift_time(x: Array, fill: float) -> Array:
    """Rows moved down by one along time, [B, H, C, ...]."""
    return jnp.concatenate([jnp.full_like(x[:, :, :1], fill), x[:, :, :-1]], axis=2)
