"""Decays and documents as the kernels receive them: the cumulative log2-decay of each chunk, for queries and for keys.

The kernels know neither documents nor padding. The first token of a document is a token with a decay of about 0, and a
padded key is a key so late that nothing of it is left for any query.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK

MIN_LOG2_DECAY = -150.0
"""Lower bound of a token's log2-decay: 2^-150 is 0 in float32, and cumulative sums of a chunk keep their accuracy."""
RESTART_LOG2_DECAY = -200.0
"""Log2-decay of the first token of a document: below `MIN_LOG2_DECAY`, and thus also 0 in float32."""
PADDING_LOG2_DECAY = 1e9
"""Cumulative log2-decay of a padded key: 2^(query - key) is 0 for every query."""
LOG2E = 1.4426950408889634
"""log2(e), which converts natural logarithms."""


class CumulativeDecay(NamedTuple):
    """Log2-decay from the start of the chunk to each token, its own included, as queries and as keys see it."""

    query: Float[Array, "B H T"]
    key: Float[Array, "B H T"]


def log2_token_decay(log_decay: Float[Array, "B T H 1"]) -> Float[Array, "B T H"]:
    """Convert natural log-decays per token to bounded log2-decays."""
    return bounded_log2_decay(log_decay)[..., 0]


def bounded_log2_decay(log_decay: Float[Array, "B T H W"]) -> Float[Array, "B T H W"]:
    """Convert natural log-decays to log2-decays of at least `MIN_LOG2_DECAY`, in float32."""
    return jnp.maximum(log_decay.astype(jnp.float32) * LOG2E, MIN_LOG2_DECAY)


def cumulative_decay(
    log2_decay: Float[Array, "B T H"] | None, document_ids: DocumentIds | None, num_heads: int
) -> CumulativeDecay | None:
    """Sum the log2-decays of each chunk, and encode documents and padding.

    Args:
        log2_decay: Log2-decay of each token; None: no decay.
        document_ids: Documents of the rows; None: one document per row.
        num_heads: Number of heads H.

    Returns:
        The gates of every head; None where nothing decays and no document ends.
    """
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
    chunks = jnp.moveaxis(log2_decay, 2, 1).reshape(log2_decay.shape[0], num_heads, -1, CHUNK)
    query = jnp.cumsum(chunks, axis=-1).reshape(*chunks.shape[:2], -1)
    return CumulativeDecay(
        query, query if document_ids is None else jnp.where(document_ids.valid[:, None], query, PADDING_LOG2_DECAY)
    )


def document_gates(document_ids: DocumentIds | None) -> CumulativeDecay | None:
    """Return the gates of the documents alone, with one head; None where no document ends."""
    return cumulative_decay(None, document_ids, 1)


def _document_starts(document_ids: DocumentIds) -> Bool[Array, "B T"]:
    """Mark the first token of each document but the first one, to which the incoming state belongs."""
    return jnp.diff(document_ids.index, axis=1, prepend=0) > 0


def decay_grad(
    token_grad: Float[Array, "B H T"], final_grad: Float[Array, "B H"], document_ids: DocumentIds | None
) -> Float[Array, "B T H"]:
    """Compute the gradient of the log2-decay.

    The decay of a token scales every pair of an earlier key and a query at the token or later. Its gradient is the sum
    of q.dq - k.dk from the token to the end of its document, and the part of the final state.

    Args:
        token_grad: q.dq - k.dk of each token.
        final_grad: Product of the final state with its gradient.
        document_ids: Documents of the rows.
    """
    token_grad = token_grad.at[:, :, -1].add(final_grad)
    restarts = None if document_ids is None else _document_starts(document_ids)[:, None]
    return _mask_decay_grad(_suffix_sum_to_restart(token_grad, restarts), document_ids)


def chunkwise_decay_grad(
    token_grad: Float[Array, "B H T"], chunk_end_grads: Float[Array, "B H N"], document_ids: DocumentIds | None
) -> Float[Array, "B T H"]:
    """Compute the same as `decay_grad` from the product of each chunk's last state with its gradient.

    The sums then end with the chunk, which keeps their rounding errors small.

    Args:
        token_grad: q.dq - k.dk of each token, over the pairs of its chunk.
        chunk_end_grads: Product of the state after each chunk with its gradient.
        document_ids: Documents of the rows.
    """
    chunks = token_grad.reshape(*chunk_end_grads.shape, -1).at[..., -1].add(chunk_end_grads)
    restarts = (
        None if document_ids is None else _document_starts(document_ids).reshape(chunks.shape[0], 1, *chunks.shape[2:])
    )
    return _mask_decay_grad(_suffix_sum_to_restart(chunks, restarts).reshape(token_grad.shape), document_ids)


def _suffix_sum_to_restart(
    x: Float[Array, "B H ... T"], restarts: Bool[Array, "B 1 ... T"] | None
) -> Float[Array, "B H ... T"]:
    """Sum from each entry to the last one before a restart."""
    if restarts is None:
        return lax.cumsum(x, axis=x.ndim - 1, reverse=True)

    def join(later, earlier):
        return jnp.where(earlier[1], earlier[0], earlier[0] + later[0]), earlier[1] | later[1]

    ends = jnp.concatenate([restarts[..., 1:], jnp.zeros_like(restarts[..., :1])], axis=-1)
    return lax.associative_scan(join, (x, jnp.broadcast_to(ends, x.shape)), axis=x.ndim - 1, reverse=True)[0]


def _mask_decay_grad(grads: Float[Array, "B H T"], document_ids: DocumentIds | None) -> Float[Array, "B T H"]:
    """Drop the gradients of document starts and padding, which have constant decays, and undo the factor log2(e)."""
    if document_ids is not None:
        grads = jnp.where(_document_starts(document_ids)[:, None] | ~document_ids.valid[:, None], 0.0, grads)
    return jnp.moveaxis(grads, 1, 2) / LOG2E
