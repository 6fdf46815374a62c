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

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.mosaic_tpu import mm, mm_t

FORGET = 128.0
"""exp(-FORGET) is 0 in float32; stronger log-decays are cut to it, which keeps the rounded sums exact."""
STEP = 16.0


def log_decay_of(
    log_decay: Float[Array, "B T H W"] | None, docs: Documents | None, heads: int
) -> Float[Array, "B T H W"] | None:
    """The log-decay in float32, 0 at padding, -FORGET where a document starts; None where nothing decays."""
    if docs is None:
        return None if log_decay is None else jnp.maximum(log_decay.astype(jnp.float32), -FORGET)
    if log_decay is None:
        log_decay = jnp.zeros((*docs.valid.shape, heads, 1), jnp.float32)
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), -FORGET)
    before = jnp.pad(docs.index[:, :-1], ((0, 0), (1, 0)))
    starts = (docs.index != before)[..., None, None]
    return jnp.where(starts, -FORGET, jnp.where(docs.valid[..., None, None], log_decay, 0))


def running(log_decay: Float[Array, "B H N C"]) -> Float[Array, "B H N 2 C"]:
    """The sum since the start of each chunk, the token's own log-decay included: of the rounded parts, of the rests.

    The gradient goes through the rests alone.
    """
    rounded = jax.lax.stop_gradient(jnp.round(log_decay * STEP) / STEP)
    return jnp.cumsum(jnp.stack([rounded, log_decay - rounded], axis=3), axis=-1)


class Decay(NamedTuple):
    """What the decays of a chunk do; None stands for no decay at all."""

    scores: Callable[..., Float[Array, "C C"]]
    """(x, y, dtype) -> the sum over channels of x_i y_j times the decay from token j to token i, 0 for j > i.

    Without a decay per channel there is a fourth argument: a function that is applied to x_i.y_j before the decay.
    """
    since_start: Float[Array, "C K"] | None
    """The token's own decay included."""
    until_end: Float[Array, "C K"] | None
    """The token's own decay left out."""
    total: Float[Array, "W 1"] | None


def causal(length: int) -> Bool[Array, "C C"]:
    """Token i may read token j <= i."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return i >= j


def no_decay(length: int) -> Decay:
    """Everything is kept."""

    def scores(x: Array, y: Array, dtype: DTypeLike, score: Callable[[Array], Array] = lambda s: s) -> Array:
        return jnp.where(causal(length), score(mm_t(x, y, dtype)), 0)

    return Decay(scores, None, None, None)


def token_decay(rows: Float[Array, "2 C"], width: int) -> Decay:
    """From the `running` sums of one log-decay per token."""
    # The sums of rounded parts have no gradient, see `running`; to say so here spares computing it.
    rows = jnp.concatenate([jax.lax.stop_gradient(rows[:1]), rows[1:]])
    end = rows[:, rows.shape[1] - 1 :]
    rest = (end[:1] - spread(rows[:1], width)) + (end[1:] - spread(rows[1:], width))
    since = spread(rows[:1], width) + spread(rows[1:], width)
    between = jnp.exp(_gaps(rows))

    def scores(x: Array, y: Array, dtype: DTypeLike, score: Callable[[Array], Array] = lambda s: s) -> Array:
        return score(mm_t(x, y, dtype)) * between

    return Decay(scores, jnp.exp(since), jnp.exp(rest), jnp.exp(end[:1] + end[1:]))


def spread(row: Float[Array, "1 C"], width: int) -> Float[Array, "C W"]:
    """As a column, along the lanes before anything is computed: all widths of 128 share what that costs."""
    return jnp.broadcast_to(row.T, (row.shape[1], width))


def _gaps(rows: Float[Array, "2 C"]) -> Float[Array, "C C"]:
    """The log-decay from token j to token i >= j, minus infinity elsewhere."""
    length = rows.shape[1]
    gaps = (spread(rows[:1], length) - rows[:1]) + (spread(rows[1:], length) - rows[1:])
    return jnp.where(causal(length), gaps, -jnp.inf)


def scaled(x: Float[Array, "I J"], factor: Float[Array, "..."] | None) -> Float[Array, "I J"]:
    """x times a factor of `Decay`."""
    return x if factor is None else x * factor


def suffix_sums(
    change: Float[Array, "1 C"], later: Float[Array, "1 1"], rows: Float[Array, "2 C"]
) -> tuple[Float[Array, "1 C"], Float[Array, "1 1"]]:
    """Sums of `change` from each token on, up to where everything is forgotten, and the `later` of the chunk before.

    later: the sum behind the chunk, from its end on.
    """
    end = rows[:, rows.shape[1] - 1 :]
    rest = (end[:1] - rows[:1]) + (end[1:] - rows[1:])
    inside = mm(change, _remembered(_gaps(rows)), jnp.float32)
    earlier = jnp.sum(change * _remembered(rows[:1] + rows[1:]), axis=1, keepdims=True)
    return inside + later * _remembered(rest), earlier + later * _remembered(end[:1] + end[1:])


def _remembered(log: Float[Array, "I J"]) -> Float[Array, "I J"]:
    """1 where something passes, 0 where everything is forgotten."""
    return (log > 1 - FORGET).astype(jnp.float32)
