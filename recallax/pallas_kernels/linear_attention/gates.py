"""Decays and documents as the kernels see them: the cumulative log2-decay of each chunk, for queries and for keys.

A new document is a token that forgets everything, and padding is a key so far in the future that nothing is left of it:
the kernels know of neither.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import Documents

LOWEST = -150.0
"""Log2-decay of a token at least: 2^-150 is 0 in float32, and differences of cumulative sums keep their digits."""
RESTART = -200.0
"""Log2-decay where a document starts."""
PADDING = 1e9
"""Cumulative log2-decay of a key that is padding."""
LOG2E = 1.4426950408889634


class Gates(NamedTuple):
    """Log2-decay from the chunk's start to each token, its own included, as queries and as keys see it."""

    query: Float[Array, "B H T"]
    key: Float[Array, "B H T"]


def log2_decay(log_decay: Float[Array, "B T H 1"]) -> Float[Array, "B T H"]:
    """What the kernels take: a log2, bounded from below."""
    return log2_decays(log_decay)[..., 0]


def log2_decays(log_decay: Float[Array, "B T H W"]) -> Float[Array, "B T H W"]:
    """As `log2_decay`, of any number of channels."""
    return jnp.maximum(log_decay.astype(jnp.float32) * LOG2E, LOWEST)


def gates_of(decay: Float[Array, "B T H"] | None, docs: Documents | None, heads: int, chunk: int) -> Gates | None:
    """The gates of every head, from the log2-decay; None where nothing decays and no document ends."""
    if decay is None and docs is None:
        return None
    if docs is not None:
        decay = jnp.zeros((*docs.valid.shape, heads), jnp.float32) if decay is None else decay
        decay = jnp.where(_restarts(docs)[..., None], RESTART, jnp.where(docs.valid[..., None], decay, 0.0))
    assert decay is not None
    chunks = jnp.moveaxis(decay, 2, 1).reshape(decay.shape[0], heads, -1, chunk)
    query = jnp.cumsum(chunks, axis=-1).reshape(*chunks.shape[:2], -1)
    return Gates(query, query if docs is None else jnp.where(docs.valid[:, None], query, PADDING))


def _restarts(docs: Documents) -> Bool[Array, "B T"]:
    """Where documents start, other than the one that the incoming state belongs to."""
    return jnp.diff(docs.index, axis=1, prepend=0) > 0


def decay_slope(
    through: Float[Array, "B H T"], at_end: Float[Array, "B H"], docs: Documents | None
) -> Float[Array, "B T H"]:
    """The gradient of the log2-decay from each token's q.dq - k.dk and from the final state's product with its own.

    A token's decay weighs every pair of an earlier key and a query that is the token's own or later, so its gradient
    is what later queries see less what later keys are seen, up to the document's end, and the final state's part.
    """
    through = through.at[:, :, -1].add(at_end)
    restarts = None if docs is None else _restarts(docs)[:, None]
    return _slope(_rest(through, restarts), docs)


def chunk_decay_slope(
    through: Float[Array, "B H T"], at_ends: Float[Array, "B H N"], docs: Documents | None
) -> Float[Array, "B T H"]:
    """As `decay_slope`, where the part of each chunk's last state is known, so that sums end with the chunk."""
    chunks = through.reshape(*at_ends.shape, -1).at[..., -1].add(at_ends)
    restarts = None if docs is None else _restarts(docs).reshape(chunks.shape[0], 1, *chunks.shape[2:])
    return _slope(_rest(chunks, restarts).reshape(through.shape), docs)


def _rest(x: Float[Array, "B H ... T"], restarts: Bool[Array, "B 1 ... T"] | None) -> Float[Array, "B H ... T"]:
    """Sums from each entry to the last one before a restart."""
    if restarts is None:
        return lax.cumsum(x, axis=x.ndim - 1, reverse=True)

    def join(later, earlier):
        return jnp.where(earlier[1], earlier[0], earlier[0] + later[0]), earlier[1] | later[1]

    ends = jnp.concatenate([restarts[..., 1:], jnp.zeros_like(restarts[..., :1])], axis=-1)
    return lax.associative_scan(join, (x, jnp.broadcast_to(ends, x.shape)), axis=x.ndim - 1, reverse=True)[0]


def _slope(slopes: Float[Array, "B H T"], docs: Documents | None) -> Float[Array, "B T H"]:
    """Of the log2-decay; there is none where a document starts and at padding."""
    if docs is not None:
        slopes = jnp.where(_restarts(docs)[:, None] | ~docs.valid[:, None], 0.0, slopes)
    return jnp.moveaxis(slopes, 1, 2) / LOG2E
