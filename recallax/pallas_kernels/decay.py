"""Scores of a chunk under a decay: s_ij = sum_d x_id y_jd exp(L_id - L_jd), L the cumulative log-decay.

A factorised exp(L_i) exp(-L_j) overflows for gates without a bound, so only sums of log-decays (never positive) are
exponentiated. The scores are built by halves: a block of 2b tokens consists of its two halves' own blocks and of the
second half's queries against the first half's keys, where both sides decay to the boundary between the halves and
nothing can overflow. Blocks of `PAIRWISE_BLOCK` tokens are computed pair by pair. Sums are taken from the boundary outwards
rather than as differences of one cumulative sum, so that no digits cancel and no rounding reaches tokens that do not
lie between query and key. With one decay per token the same tree builds the matrix of decays, faster than
exponentiating all C x C differences.

Source: the secondary chunking of GLA (Yang et al. 2023, arXiv 2312.06635, section 4.3), here as a binary tree.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.dispatch import require
from recallax.pallas_kernels.einsum_f32 import einsum_f32

PAIRWISE_BLOCK = 4


def broadcast_decay(
    op: str, log_decay: Float[Array, "..."] | None, shape: tuple[int, int, int, int]
) -> Float[Array, "B T H W"] | None:
    """The decay of an op as [B, T, H, 1] or [B, T, H, K]. Raises ValueError for any shape but [H] and those."""
    if log_decay is None:
        return None
    wanted = (shape[2:3], shape[:3], shape)
    if log_decay.shape == shape:
        return log_decay
    require(op, log_decay.shape in wanted, f"log_decay has shape {log_decay.shape}; it must be one of {wanted}")
    return jnp.broadcast_to(log_decay, shape[:3])[..., None]


def step_decay_factor(log_decay: Float[Array, "..."], state: Float[Array, "B H K V"]) -> Float[Array, "B H W 1"]:
    """The factor of one step on the state, for a decay [H], [B, H] or [B, H, K]."""
    factor = jnp.exp(log_decay.astype(state.dtype))
    return factor[..., None] if factor.ndim == 3 else jnp.broadcast_to(factor, state.shape[:2])[..., None, None]


def log_decay_from_start(log_decay: Float[Array, "B C H W"]) -> Float[Array, "B C H W"]:
    """Log-decay from the chunk's start to each token, the token's own included."""
    return jnp.cumsum(log_decay, axis=1)


def log_decay_to_end(log_decay: Float[Array, "B C H W"]) -> Float[Array, "B C H W"]:
    """Log-decay from each token to the chunk's end, the token's own left out."""
    return _exclusive_suffix_sum(log_decay, axis=1)


def _exclusive_suffix_sum(x: Array, axis: int) -> Array:
    """Sums over what follows each entry along an axis."""
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
    """Float32 scores of queries x and keys y, 0 where not `visible`.

    log_decay: float32, at most 0; W is 1 (per token) or K (per channel). visible: within the past and one document.
    score: applied to the scores before the decay; per-channel decay has no such hook.
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
    whole = size
    while whole < length:
        whole *= 2
    x, y, log_decay = (jnp.pad(a, ((0, 0), (0, whole - length), (0, 0), (0, 0))) for a in (x, y, log_decay))

    def blocks(a: Array, size: int) -> Array:
        """[B, H, blocks, size, K]"""
        return jnp.moveaxis(a, 2, 1).reshape(a.shape[0], a.shape[2], -1, size, a.shape[-1])

    a, b, own = (blocks(part, size) for part in (x, y, log_decay))
    before = jnp.tril(jnp.ones((size, size), bool), -1)[None, None, None, :, :, None]
    gap = jnp.cumsum(jnp.where(before, own[..., :, None, :], 0), axis=-3)  # of i, j: the log-decays of j + 1 to i
    pairs = a.astype(jnp.float32)[..., :, None, :] * b.astype(jnp.float32)[..., None, :, :]
    scores = jnp.sum(pairs * jnp.exp(gap), axis=-1)
    while size < whole:
        a, b, own = (blocks(part, 2 * size) for part in (x, y, log_decay))
        # The boundary is the end of the first half: queries decay since then, keys until then.
        queries = a[..., size:, :] * jnp.exp(jnp.cumsum(own[..., size:, :], axis=-2)).astype(x.dtype)
        keys = b[..., :size, :] * jnp.exp(_exclusive_suffix_sum(own[..., :size, :], axis=3)).astype(x.dtype)
        across = einsum_f32("bhnik,bhnjk->bhnij", queries, keys)
        first, second = (scores.reshape(*scores.shape[:2], -1, 2, size, size)[..., half, :, :] for half in (0, 1))
        upper = jnp.concatenate([first, jnp.zeros_like(across)], axis=-1)
        scores = jnp.concatenate([upper, jnp.concatenate([across, second], axis=-1)], axis=-2)
        size *= 2
    return scores[:, :, 0, :length, :length]
