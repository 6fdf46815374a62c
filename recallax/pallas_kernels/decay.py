"""Scores of a chunk with decay: s_ij = sum_d x_id y_jd exp(L_id - L_jd), where L is the cumulative log-decay.

The factorisation exp(L_i) exp(-L_j) overflows for unbounded gates, so only sums of log-decays, which are never
positive, are exponentiated. The scores are built as a binary tree: a block of 2b tokens consists of the blocks of its
two halves and of the second half's queries against the first half's keys. Both of these decay to the boundary between
the halves, which cannot overflow. Blocks of `PAIRWISE_BLOCK` tokens are computed pair by pair. The sums start at the
boundary instead of being differences of one cumulative sum: this avoids cancellation, and rounding errors depend only
on tokens between query and key. With one decay per token the same tree builds the matrix of decays; this is faster
than exponentiating all C x C differences.

Source: the secondary chunking of GLA (Yang et al. 2023, arXiv 2312.06635, section 4.3), here as a binary tree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.dispatch import require
from recallax.pallas_kernels.einsum_f32 import einsum_f32

PAIRWISE_BLOCK = 4
"""Tokens of a block whose scores are computed pair by pair; a power of two."""


def broadcast_decay(
    op: str, log_decay: Float[Array, "..."] | None, shape: tuple[int, int, int, int]
) -> Float[Array, "B T H W"] | None:
    """Broadcast the decay of an op to [B, T, H, 1] or [B, T, H, K].

    Args:
        op: Name of the op, for the error message.
        log_decay: Log-decay of shape [H], [B, T, H] or [B, T, H, K]; None stays None.
        shape: (B, T, H, K).

    Raises:
        ValueError: The shape is none of these.
    """
    if log_decay is None:
        return None
    allowed = (shape[2:3], shape[:3], shape)
    if log_decay.shape == shape:
        return log_decay
    require(op, log_decay.shape in allowed, f"log_decay has shape {log_decay.shape}; it must be one of {allowed}")
    return jnp.broadcast_to(log_decay, shape[:3])[..., None]


def step_decay_factor(log_decay: Float[Array, "..."], state: Float[Array, "B H K V"]) -> Float[Array, "B H W 1"]:
    """Return the factor of the state in one step.

    Args:
        log_decay: Natural log-decay [H], [B, H] or [B, H, K].
        state: The state, for its shape and dtype.

    Returns:
        The factor in the state's dtype; W is 1 or K.
    """
    factor = jnp.exp(log_decay.astype(state.dtype))
    return factor[..., None] if factor.ndim == 3 else jnp.broadcast_to(factor, state.shape[:2])[..., None, None]


def log_decay_from_start(log_decay: Float[Array, "B C H W"]) -> Float[Array, "B C H W"]:
    """Log-decay from the start of the chunk to each token, inclusive of the token's own."""
    return jnp.cumsum(log_decay, axis=1)


def log_decay_to_end(log_decay: Float[Array, "B C H W"]) -> Float[Array, "B C H W"]:
    """Log-decay from each token to the end of the chunk, exclusive of the token's own."""
    return _exclusive_suffix_sum(log_decay, axis=1)


def _exclusive_suffix_sum(x: Array, axis: int) -> Array:
    """Sum of all later entries along an axis."""
    later = jnp.flip(jax.lax.slice_in_dim(x, 1, None, axis=axis), axis)
    sums = jnp.flip(jnp.cumsum(later, axis=axis), axis)
    return jnp.concatenate([sums, jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))], axis=axis)


def decayed_scores(
    x: Float[Array, "B C H K"],
    y: Float[Array, "B C H K"],
    log_decay: Float[Array, "B C H W"] | None,
    visible: Bool[Array, "B C C"],
    score_fn: Callable[[Array], Array] = lambda s: s,
) -> Float[Array, "B H C C"]:
    """Return the float32 scores of queries and keys with decay, 0 where not `visible`.

    Args:
        x: Queries.
        y: Keys.
        log_decay: Float32 log-decay, at most 0; W is 1 (per token) or K (per channel). None: no decay.
        visible: True where query i reads key j: j <= i and the same document.
        score_fn: Applied to the scores before the decay; ignored with a decay per channel.
    """
    if log_decay is not None and log_decay.shape[-1] > 1:
        return jnp.where(visible[:, None], _hierarchical_scores(x, y, log_decay), 0)
    scores = jnp.where(visible[:, None], score_fn(einsum_f32("bihk,bjhk->bhij", x, y)), 0)
    if log_decay is None:
        return scores
    ones = jnp.ones_like(log_decay)
    return scores * _hierarchical_scores(ones, ones, log_decay)


def _hierarchical_scores(
    x: Float[Array, "B C H K"], y: Float[Array, "B C H K"], log_decay: Float[Array, "B C H K"]
) -> Float[Array, "B H C C"]:
    length, size = x.shape[1], PAIRWISE_BLOCK
    padded_length = size
    while padded_length < length:
        padded_length *= 2
    x, y, log_decay = (jnp.pad(a, ((0, 0), (0, padded_length - length), (0, 0), (0, 0))) for a in (x, y, log_decay))

    def blocks(a: Array, size: int) -> Array:
        """[B, H, blocks, size, K]"""
        return jnp.moveaxis(a, 2, 1).reshape(a.shape[0], a.shape[2], -1, size, a.shape[-1])

    a, b, decay = (blocks(part, size) for part in (x, y, log_decay))
    earlier = jnp.tril(jnp.ones((size, size), bool), -1)[None, None, None, :, :, None]
    # [i, j]: sum over j + 1, ..., i
    log_decay_between = jnp.cumsum(jnp.where(earlier, decay[..., :, None, :], 0), axis=-3)
    pairs = a.astype(jnp.float32)[..., :, None, :] * b.astype(jnp.float32)[..., None, :, :]
    scores = jnp.sum(pairs * jnp.exp(log_decay_between), axis=-1)
    while size < padded_length:
        a, b, decay = (blocks(part, 2 * size) for part in (x, y, log_decay))
        # Queries decay from the end of the first half, keys decay to it.
        queries = a[..., size:, :] * jnp.exp(jnp.cumsum(decay[..., size:, :], axis=-2)).astype(x.dtype)
        keys = b[..., :size, :] * jnp.exp(_exclusive_suffix_sum(decay[..., :size, :], axis=3)).astype(x.dtype)
        across = einsum_f32("bhnik,bhnjk->bhnij", queries, keys)
        first, second = (scores.reshape(*scores.shape[:2], -1, 2, size, size)[..., half, :, :] for half in (0, 1))
        upper = jnp.concatenate([first, jnp.zeros_like(across)], axis=-1)
        scores = jnp.concatenate([upper, jnp.concatenate([across, second], axis=-1)], axis=-2)
        size *= 2
    return scores[:, :, 0, :length, :length]
