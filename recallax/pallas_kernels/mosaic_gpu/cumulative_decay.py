"""Decays and documents as the kernels see them: the cumulative log2-decay of each chunk, for queries and for keys.

A new document is a token that forgets everything, and padding is a key so far in the future that nothing is left of it:
the kernels know of neither.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import DocumentIds

MIN_LOG2_DECAY = -150.0
"""Log2-decay of a token at least: 2^-150 is 0 in float32, and differences of cumulative sums keep their digits."""
RESTART_LOG2_DECAY = -200.0
"""Log2-decay where a document starts."""
PADDING_LOG2_DECAY = 1e9
"""Cumulative log2-decay of a key that is padding."""
LOG2E = 1.4426950408889634


class CumulativeDecay(NamedTuple):
    """Log2-decay from the chunk's start to each token, its own included, as queries and as keys see it."""

    query: Float[Array, "B H T"]
    key: Float[Array, "B H T"]


def log2_token_decay(log_decay: Float[Array, "B T H 1"]) -> Float[Array, "B T H"]:
    """What the kernels take: a log2, bounded from below."""
    return bounded_log2_decay(log_decay)[..., 0]


def bounded_log2_decay(log_decay: Float[Array, "B T H W"]) -> Float[Array, "B T H W"]:
    """As `log2_token_decay`, of any number of channels."""
    return jnp.maximum(log_decay.astype(jnp.float32) * LOG2E, MIN_LOG2_DECAY)


def cumulative_decay(
    log2_decay: Float[Array, "B T H"] | None, document_ids: DocumentIds | None, num_heads: int, chunk_size: int
) -> CumulativeDecay | None:
    """The gates of every head, from the log2-decay; None where nothing decays and no document ends."""
    if log2_decay is None and document_ids is None:
        return None
    if document_ids is not None:
        log2_decay = (
            jnp.zeros((*document_ids.valid.shape, num_heads), jnp.float32) if log2_decay is None else log2_decay
        )
        log2_decay = jnp.where(
            _document_starts(document_ids)[..., None],
            RESTART_LOG2_DECAY,
            jnp.where(document_ids.valid[..., None], log2_decay, 0.0),
        )
    assert log2_decay is not None
    chunks = jnp.moveaxis(log2_decay, 2, 1).reshape(log2_decay.shape[0], num_heads, -1, chunk_size)
    query = jnp.cumsum(chunks, axis=-1).reshape(*chunks.shape[:2], -1)
    return CumulativeDecay(
        query, query if document_ids is None else jnp.where(document_ids.valid[:, None], query, PADDING_LOG2_DECAY)
    )


def _document_starts(document_ids: DocumentIds) -> Bool[Array, "B T"]:
    """Where documents start, other than the one that the incoming state belongs to."""
    return jnp.diff(document_ids.index, axis=1, prepend=0) > 0


def decay_grad(
    token_grad: Float[Array, "B H T"], final_grad: Float[Array, "B H"], document_ids: DocumentIds | None
) -> Float[Array, "B T H"]:
    """The gradient of the log2-decay from each token's q.dq - k.dk and from the final state's product with its own.

    A token's decay weighs every pair of an earlier key and a query that is the token's own or later, so its gradient
    is what later queries see less what later keys are seen, up to the document's end, and the final state's part.
    """
    token_grad = token_grad.at[:, :, -1].add(final_grad)
    restarts = None if document_ids is None else _document_starts(document_ids)[:, None]
    return _mask_decay_grad(_suffix_sum_to_restart(token_grad, restarts), document_ids)


def chunkwise_decay_grad(
    token_grad: Float[Array, "B H T"], chunk_end_grads: Float[Array, "B H N"], document_ids: DocumentIds | None
) -> Float[Array, "B T H"]:
    """As `decay_grad`, where the part of each chunk's last state is known, so that sums end with the chunk."""
    chunks = token_grad.reshape(*chunk_end_grads.shape, -1).at[..., -1].add(chunk_end_grads)
    restarts = (
        None if document_ids is None else _document_starts(document_ids).reshape(chunks.shape[0], 1, *chunks.shape[2:])
    )
    return _mask_decay_grad(_suffix_sum_to_restart(chunks, restarts).reshape(token_grad.shape), document_ids)


def _suffix_sum_to_restart(
    x: Float[Array, "B H ... T"], restarts: Bool[Array, "B 1 ... T"] | None
) -> Float[Array, "B H ... T"]:
    """Sums from each entry to the last one before a restart."""
    if restarts is None:
        return lax.cumsum(x, axis=x.ndim - 1, reverse=True)

    def join(later, earlier):
        return jnp.where(earlier[1], earlier[0], earlier[0] + later[0]), earlier[1] | later[1]

    ends = jnp.concatenate([restarts[..., 1:], jnp.zeros_like(restarts[..., :1])], axis=-1)
    return lax.associative_scan(join, (x, jnp.broadcast_to(ends, x.shape)), axis=x.ndim - 1, reverse=True)[0]


def _mask_decay_grad(grads: Float[Array, "B H T"], document_ids: DocumentIds | None) -> Float[Array, "B T H"]:
    """Of the log2-decay; there is none where a document starts and at padding."""
    if document_ids is not None:
        grads = jnp.where(_document_starts(document_ids)[:, None] | ~document_ids.valid[:, None], 0.0, grads)
    return jnp.moveaxis(grads, 1, 2) / LOG2E
