"""Linear memory with gradients per token: functions shared by its kernels and its XLA implementation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.update_coefficients import MemoryInputs, OuterParams, UpdateCoefficients


def require_sequential(inner_optimizer: InnerOptimizer, outer_params: OuterParams) -> None:
    """Check the options that no kernel supports.

    Args:
        inner_optimizer: Network, loss and update rule.
        outer_params: Initial weights and norm of the network.

    Raises:
        Unsupported: Gradients are computed at the start of chunks, or documents start with initial fast weights.
    """
    if inner_optimizer.gradient == "chunk_start":
        raise Unsupported("gradient is 'chunk_start'; the kernel supports gradients per token only")
    if outer_params.initial_fast_weights is not None:
        raise Unsupported("initial_fast_weights are given; the kernel starts documents with the initial weights")


def subtract_initial_weights(
    inner_optimizer: InnerOptimizer,
    initial_weights: Float[Array, "H I O"],
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    document_starts: Bool[Array, "B T"],
) -> tuple[Array, Float[Array, "B T H O"], Float[Array, "B H I O"]]:
    """Separate the contribution of the initial weights, in which the memory is linear.

    The weights at token t contain b_t times the initial ones. b is 1, unless the weights decay to zero: then it is the
    product of keep since the first token of the document or of the row.

    Args:
        inner_optimizer: Defines what the weights decay to.
        initial_weights: Initial weights of each head.
        q: Queries [B, T, H, I].
        k: Keys [B, T, H, I].
        v: Targets [B, T, H, O].
        log_decay: Log of keep [B, T, H, 1].
        document_starts: True where a document starts.

    Returns:
        Targets minus the prediction of the initial weights, outputs of the initial weights, and the term to add to the
        final delta.
    """
    read, predicted = (einsum_f32("bthi,hio->btho", x, initial_weights.astype(x.dtype)) for x in (q, k))
    if inner_optimizer.decay_to == "init":
        return (
            (v.astype(jnp.float32) - predicted).astype(v.dtype),
            read,
            jnp.zeros((q.shape[0], *initial_weights.shape), jnp.float32),
        )
    from_start = jnp.cumsum(log_decay, axis=1)
    first = jax.lax.cummin(jnp.where(document_starts[..., None, None], from_start - log_decay, 0), axis=1)
    b_after, b_before = jnp.exp(from_start - first), jnp.exp(from_start - log_decay - first)
    b_gradient = b_after if inner_optimizer.gradient == "token_decayed" else b_before
    final_term = (jnp.moveaxis(b_after[:, -1:], 1, 2) - 1) * initial_weights[None]
    return (v.astype(jnp.float32) - b_gradient * predicted).astype(v.dtype), b_after * read, final_term


def shifted_coefficients(
    inner_optimizer: InnerOptimizer,
    tokens: MemoryInputs,
    coefficients: UpdateCoefficients,
    visible: Bool[Array, "B C C"],
) -> tuple[Float[Array, "B H C"], Float[Array, "B H C"], Float[Array, "B H C C"]]:
    """Return the coefficients of the weights at which each token's gradient is computed.

    They are those of the previous token of the document. At its first token only the initial weights contribute.

    Args:
        inner_optimizer: Defines whether the gradient is computed before or after the decay.
        tokens: Tokens of a chunk.
        coefficients: Coefficients of the chunk, without the axis of the matrices.
        visible: True where token t reads token s.

    Returns:
        Coefficients of the carried weights, of the carried momentum and of the gradients.
    """
    earlier = visible & ~jnp.eye(visible.shape[1], dtype=bool)[None]
    first = (~earlier.any(axis=-1))[:, None]
    beta = jnp.where(first, 1.0, _shift_time(coefficients.initial_weights, 1.0))
    f = jnp.where(first, 0.0, _shift_time(coefficients.initial_momentum, 0.0))
    g = jnp.where(earlier[:, None], _shift_time(coefficients.gradients, 0.0), 0)
    if inner_optimizer.gradient != "token_decayed":
        return beta, f, g
    keep = jnp.exp(jnp.moveaxis(tokens.log_decay[..., 0].astype(jnp.float32), 1, 2))
    return beta * keep, f * keep, g * keep[..., None]


def _shift_time(x: Array, fill: float) -> Array:
    """Shift [B, H, C, ...] by one token along time and fill the first one."""
    return jnp.concatenate([jnp.full_like(x[:, :, :1], fill), x[:, :, :-1]], axis=2)
