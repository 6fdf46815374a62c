"""Decays per token and the borders of documents, as the kernels for TPUs take them.

A border is a decay: where a document starts, everything before is forgotten, and exp of the log-decay underflows to
exactly 0. So kernels need no masks besides the causal one, and without documents nothing is spent on them.

Inside a chunk exp(L_i - L_j) is needed, L the running sum of log-decays. Differences of one float32 sum would cancel
digits behind a strong gate, so L is held as two numbers: the sum of the log-decays rounded to sixteenths, which is
exact, and the sum of the small rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import dot, dot_nt

MAX_LOG_DECAY = 128.0
"""exp(-FORGET) is 0 in float32; stronger log-decays are cut to it, which keeps the rounded sums exact."""
ROUNDING_STEPS = 16.0


def document_log_decay(
    log_decay: Float[Array, "B T H W"] | None, document_ids: DocumentIds | None, num_heads: int
) -> Float[Array, "B T H W"] | None:
    """The log-decay in float32, 0 at padding, -FORGET where a document starts; None where nothing decays."""
    if document_ids is None:
        return None if log_decay is None else jnp.maximum(log_decay.astype(jnp.float32), -MAX_LOG_DECAY)
    if log_decay is None:
        log_decay = jnp.zeros((*document_ids.valid.shape, num_heads, 1), jnp.float32)
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), -MAX_LOG_DECAY)
    before = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    starts = (document_ids.index != before)[..., None, None]
    return jnp.where(starts, -MAX_LOG_DECAY, jnp.where(document_ids.valid[..., None, None], log_decay, 0))


def running_sums(log_decay: Float[Array, "B H N C"]) -> Float[Array, "B H N 2 C"]:
    """The sum since the start of each chunk, the token's own log-decay included: of the rounded parts, of the rests.

    The gradient goes through the rests alone.
    """
    rounded = jax.lax.stop_gradient(jnp.round(log_decay * ROUNDING_STEPS) / ROUNDING_STEPS)
    return jnp.cumsum(jnp.stack([rounded, log_decay - rounded], axis=3), axis=-1)


class ChunkDecay(NamedTuple):
    """What the decays of a chunk do; None stands for no decay at all."""

    scores: Callable[..., Float[Array, "C C"]]
    """(x, y, dtype) -> the sum over channels of x_i y_j times the decay from token j to token i, 0 for j > i.

    Without a decay per channel there is a fourth argument: a function that is applied to x_i.y_j before the decay.
    """
    decay_from_start: Float[Array, "C K"] | None
    """The token's own decay included."""
    decay_to_end: Float[Array, "C K"] | None
    """The token's own decay left out."""
    total_decay: Float[Array, "W 1"] | None


def causal_mask(length: int) -> Bool[Array, "C C"]:
    """Token i may read token j <= i."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return i >= j


def no_decay(length: int) -> ChunkDecay:
    """Everything is kept."""

    def scores(x: Array, y: Array, dtype: DTypeLike, score: Callable[[Array], Array] = lambda s: s) -> Array:
        return jnp.where(causal_mask(length), score(dot_nt(x, y, dtype)), 0)

    return ChunkDecay(scores, None, None, None)


def token_decay(rows: Float[Array, "2 C"], width: int) -> ChunkDecay:
    """From the `running_sums` sums of one log-decay per token."""
    # The sums of rounded parts have no gradient, see `running_sums`; to say so here spares computing it.
    rows = jnp.concatenate([jax.lax.stop_gradient(rows[:1]), rows[1:]])
    end = rows[:, rows.shape[1] - 1 :]
    rest = (end[:1] - broadcast_column(rows[:1], width)) + (end[1:] - broadcast_column(rows[1:], width))
    since = broadcast_column(rows[:1], width) + broadcast_column(rows[1:], width)
    between = jnp.exp(_log_decay_between(rows))

    def scores(x: Array, y: Array, dtype: DTypeLike, score: Callable[[Array], Array] = lambda s: s) -> Array:
        return score(dot_nt(x, y, dtype)) * between

    return ChunkDecay(scores, jnp.exp(since), jnp.exp(rest), jnp.exp(end[:1] + end[1:]))


def broadcast_column(row: Float[Array, "1 C"], width: int) -> Float[Array, "C W"]:
    """As a column, along the lanes before anything is computed: all widths of 128 share what that costs."""
    return jnp.broadcast_to(row.T, (row.shape[1], width))


def _log_decay_between(rows: Float[Array, "2 C"]) -> Float[Array, "C C"]:
    """The log-decay from token j to token i >= j, minus infinity elsewhere."""
    length = rows.shape[1]
    gaps = (broadcast_column(rows[:1], length) - rows[:1]) + (broadcast_column(rows[1:], length) - rows[1:])
    return jnp.where(causal_mask(length), gaps, -jnp.inf)


def scale_by_decay(x: Float[Array, "I J"], factor: Float[Array, "..."] | None) -> Float[Array, "I J"]:
    """x times a factor of `ChunkDecay`."""
    return x if factor is None else x * factor


def token_suffix_sums(
    values: Float[Array, "1 C"], next_sum: Float[Array, "1 1"], rows: Float[Array, "2 C"]
) -> tuple[Float[Array, "1 C"], Float[Array, "1 1"]]:
    """Sums of `values` from each token on, up to where everything is forgotten, and the `next_sum` of the chunk before.

    later: the sum behind the chunk, from its end on.
    """
    end = rows[:, rows.shape[1] - 1 :]
    rest = (end[:1] - rows[:1]) + (end[1:] - rows[1:])
    inside = dot(values, _not_forgotten(_log_decay_between(rows)), jnp.float32)
    earlier = jnp.sum(values * _not_forgotten(rows[:1] + rows[1:]), axis=1, keepdims=True)
    return inside + next_sum * _not_forgotten(rest), earlier + next_sum * _not_forgotten(end[:1] + end[1:])


def _not_forgotten(log_decay: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """1 where something passes, 0 where everything is forgotten."""
    return (log_decay > 1 - MAX_LOG_DECAY).astype(jnp.float32)
