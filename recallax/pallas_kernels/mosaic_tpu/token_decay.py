"""Decay per token and document boundaries in the TPU kernels.

A document boundary is a decay: where a document starts, the log-decay is so low that its exponential underflows to
exactly 0. So kernels need only the causal mask, and rows without segment ids have no overhead.

A chunk needs exp(L_i - L_j), where L is the running sum of log-decays. Differences of one float32 sum are inaccurate
after a strong decay, so L is stored as two numbers: the sum of the log-decays rounded to multiples of
1 / `ROUNDING_STEPS`, which is exact, and the sum of the remainders.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_nt

MAX_LOG_DECAY = 128.0
"""Log-decays are clipped to -MAX_LOG_DECAY, whose exponential is 0 in float32: this keeps the rounded sums exact."""
ROUNDING_STEPS = 16.0
"""The rounded part of a log-decay is a multiple of 1 / ROUNDING_STEPS: sums of these are exact in float32."""


def document_log_decay(
    log_decay: Float[Array, "B T H W"] | None, document_ids: DocumentIds | None, num_heads: int
) -> Float[Array, "B T H W"] | None:
    """Combine the log-decay with the document boundaries.

    Args:
        log_decay: Log-decay, W = 1 (per token) or W = K (per channel); None: no decay.
        document_ids: Documents of each row; None: one document without padding.
        num_heads: Number of value heads H.

    Returns:
        Float32 log-decay, 0 at padding and -MAX_LOG_DECAY where a document starts; None if there is no decay at all.
    """
    if document_ids is None:
        return None if log_decay is None else jnp.maximum(log_decay.astype(jnp.float32), -MAX_LOG_DECAY)
    if log_decay is None:
        log_decay = jnp.zeros((*document_ids.valid.shape, num_heads, 1), jnp.float32)
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), -MAX_LOG_DECAY)
    before = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    starts = (document_ids.index != before)[..., None, None]
    return jnp.where(starts, -MAX_LOG_DECAY, jnp.where(document_ids.valid[..., None, None], log_decay, 0))


def running_sums(log_decay: Float[Array, "B H N C"]) -> Float[Array, "B H N 2 C"]:
    """Cumulative log-decay of each chunk, inclusive: the sums of the rounded parts and of the remainders.

    The gradient flows through the remainders only.
    """
    rounded = jax.lax.stop_gradient(jnp.round(log_decay * ROUNDING_STEPS) / ROUNDING_STEPS)
    return jnp.cumsum(jnp.stack([rounded, log_decay - rounded], axis=3), axis=-1)


class ChunkDecay(NamedTuple):
    """Effects of the decay in one chunk; the factors are None without decay."""

    scores: Callable[..., Float[Array, "C C"]]
    """(x, y, dtype) -> sum over channels of x_i y_j times the decay from token j to token i, 0 for j > i.

    Without a decay per channel it takes a fourth argument, a function that is applied to x_i.y_j before the decay.
    """
    decay_from_start: Float[Array, "C K"] | None
    """Factor from the start of the chunk to each token, inclusive of the token's own decay."""
    decay_to_end: Float[Array, "C K"] | None
    """Factor from each token to the end of the chunk, exclusive of the token's own decay."""
    total_decay: Float[Array, "W 1"] | None
    """Factor of the state over the whole chunk."""


def causal_mask(length: int) -> Bool[Array, "C C"]:
    """Causal mask: True where token i reads token j, j <= i."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return i >= j


def no_decay(length: int) -> ChunkDecay:
    """Return the `ChunkDecay` of a chunk without decay."""

    def scores(x: Array, y: Array, dtype: DTypeLike, score: Callable[[Array], Array] = lambda s: s) -> Array:
        return jnp.where(causal_mask(length), score(dot_nt(x, y, dtype)), 0)

    return ChunkDecay(scores, None, None, None)


def token_decay(rows: Float[Array, "2 C"], width: int) -> ChunkDecay:
    """Return the `ChunkDecay` of a decay per token.

    Args:
        rows: `running_sums` of the chunk.
        width: Width W of the returned factors.
    """
    # The sums of the rounded parts have no gradient (`running_sums`); stop_gradient here avoids computing it.
    rows = jnp.concatenate([jax.lax.stop_gradient(rows[:1]), rows[1:]])
    end = rows[:, rows.shape[1] - 1 :]
    to_end = (end[:1] - broadcast_column(rows[:1], width)) + (end[1:] - broadcast_column(rows[1:], width))
    from_start = broadcast_column(rows[:1], width) + broadcast_column(rows[1:], width)
    between = jnp.exp(_log_decay_between(rows))

    def scores(x: Array, y: Array, dtype: DTypeLike, score: Callable[[Array], Array] = lambda s: s) -> Array:
        return score(dot_nt(x, y, dtype)) * between

    return ChunkDecay(scores, jnp.exp(from_start), jnp.exp(to_end), jnp.exp(end[:1] + end[1:]))


def broadcast_column(row: Float[Array, "1 C"], width: int) -> Float[Array, "C W"]:
    """Transpose a row to a column and broadcast it along the lanes, before elementwise work on it."""
    return jnp.broadcast_to(row.T, (row.shape[1], width))


def _log_decay_between(rows: Float[Array, "2 C"]) -> Float[Array, "C C"]:
    """Log-decay from token j to token i >= j; minus infinity elsewhere."""
    length = rows.shape[1]
    log_decay = (broadcast_column(rows[:1], length) - rows[:1]) + (broadcast_column(rows[1:], length) - rows[1:])
    return jnp.where(causal_mask(length), log_decay, -jnp.inf)


def scale_by_decay(x: Float[Array, "I J"], factor: Float[Array, "..."] | None) -> Float[Array, "I J"]:
    """Multiply x by a factor of `ChunkDecay`; None is no decay."""
    return x if factor is None else x * factor


def token_suffix_sums(
    values: Float[Array, "1 C"], next_sum: Float[Array, "1 1"], rows: Float[Array, "2 C"]
) -> tuple[Float[Array, "1 C"], Float[Array, "1 1"]]:
    """Sum `values` over each token and its successors up to the next document start.

    Args:
        values: One value per token of the chunk.
        next_sum: The same sum for the first token of the next chunk.
        rows: `running_sums` of the chunk.

    Returns:
        The sums of the chunk's tokens, and the `next_sum` of the previous chunk.
    """
    end = rows[:, rows.shape[1] - 1 :]
    to_end = (end[:1] - rows[:1]) + (end[1:] - rows[1:])
    inside = dot(values, _same_document(_log_decay_between(rows)), jnp.float32)
    earlier = jnp.sum(values * _same_document(rows[:1] + rows[1:]), axis=1, keepdims=True)
    return inside + next_sum * _same_document(to_end), earlier + next_sum * _same_document(end[:1] + end[1:])


def _same_document(log_decay: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """1 where the log-decay crosses no document boundary, else 0."""
    return (log_decay > 1 - MAX_LOG_DECAY).astype(jnp.float32)
