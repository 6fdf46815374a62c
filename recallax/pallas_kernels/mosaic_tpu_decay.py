"""Decays per token and the borders of documents, as the kernels for TPUs take them.

A border is a decay: where a document starts, everything before is forgotten, and exp of the log-decay underflows to
exactly 0. So kernels need no masks besides the causal one, and without documents nothing is spent on them.

Inside a chunk exp(L_i - L_j) is needed, L the running sum of log-decays. Differences of one float32 sum would cancel
digits behind a strong gate, so L is held as two numbers: the sum of the log-decays rounded to sixteenths, which is
exact, and the sum of the small rest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import Documents

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


def running(log_decay: Float[Array, "B H T"], chunk: int) -> Float[Array, "B H 2 T"]:
    """The sum since the start of each chunk, the token's own log-decay included: of the rounded parts, of the rests.

    The gradient goes through the rests alone.
    """
    rounded = jax.lax.stop_gradient(jnp.round(log_decay * STEP) / STEP)
    parts = jnp.stack([rounded, log_decay - rounded], axis=2)
    shape = parts.shape
    return jnp.cumsum(parts.reshape(*shape[:3], -1, chunk), axis=-1).reshape(shape)


class Decay(NamedTuple):
    """The decays of a chunk; None stands for 1."""

    between: Float[Array, "C C"]
    """From token j to token i, 0 for j > i."""
    since_start: Float[Array, "C 1"] | None
    """The token's own decay included."""
    until_end: Float[Array, "C 1"] | None
    """The token's own decay left out."""
    total: Float[Array, "1 1"] | None


def causal(length: int) -> Bool[Array, "C C"]:
    """Token i may read token j <= i."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return i >= j


def token_decay(rows: Float[Array, "2 C"]) -> Decay:
    """The decays of a chunk from its `running` sums."""
    length = rows.shape[1]
    columns = rows.T
    end = rows[:, length - 1 :]
    gap = (columns[:, :1] - rows[:1]) + (columns[:, 1:] - rows[1:])
    rest = (end[:1] - columns[:, :1]) + (end[1:] - columns[:, 1:])
    since = columns[:, :1] + columns[:, 1:]
    between = jnp.exp(jnp.where(causal(length), gap, -jnp.inf))
    return Decay(between, jnp.exp(since), jnp.exp(rest), jnp.exp(end[:1] + end[1:]))


def no_decay(length: int) -> Decay:
    """Everything is kept."""
    return Decay(causal(length).astype(jnp.float32), None, None, None)


def scaled(x: Float[Array, "I J"], factor: Float[Array, "..."] | None) -> Float[Array, "I J"]:
    """x times a factor of `Decay`."""
    return x if factor is None else x * factor


def suffix_sums(x: Float[Array, "B H T"], log_decay: Float[Array, "B H T"]) -> Float[Array, "B H T"]:
    """Sums of x from each token on, up to where everything is forgotten."""

    def join(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] | earlier[0], jnp.where(earlier[0], earlier[1], earlier[1] + later[1])

    # A token that forgets belongs to what follows it, so the sums stop behind the token before it.
    last = jnp.pad(log_decay[..., 1:], ((0, 0), (0, 0), (0, 1))) <= -FORGET
    return jax.lax.associative_scan(join, (last, x), reverse=True, axis=2)[1]
