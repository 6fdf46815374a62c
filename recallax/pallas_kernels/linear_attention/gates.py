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
    return jnp.maximum(log_decay[..., 0].astype(jnp.float32) * LOG2E, LOWEST)


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
    if docs is None:
        slopes = lax.cumsum(through, axis=2, reverse=True)
    else:
        restarts = _restarts(docs)[:, None]

        def join(later, earlier):
            return jnp.where(earlier[1], earlier[0], earlier[0] + later[0]), earlier[1] | later[1]

        ends = jnp.concatenate([restarts[:, :, 1:], jnp.zeros_like(restarts[:, :, :1])], axis=2)
        ends = jnp.broadcast_to(ends, through.shape)
        slopes, _ = lax.associative_scan(join, (through, ends), axis=2, reverse=True)
        slopes = jnp.where(restarts | ~docs.valid[:, None], 0.0, slopes)
    return jnp.moveaxis(slopes, 1, 2) / LOG2E
