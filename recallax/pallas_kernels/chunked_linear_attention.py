"""Linear attention in chunks: quadratic within a chunk, with a state carried between chunks.

With L the cumulative log-decay of the chunk, s_ij = q_i.k_j and S the state at its start,

    o_i = exp(L_i) S^T phi(q_i) + sum_{j<=i} exp(L_i - L_j) f(s_ij) v_j
    S  <- exp(L_C) S + sum_j exp(L_C - L_j) phi(k_j) v_j^T

where f(q.k) = phi(q).phi(k). For linear attention f and phi are the identity. For BASED f is a polynomial and phi its
features, which are computed for the carried state only. A decay per channel is part of the scores (`decay.py`). Sums
are float32; operands of products have the inputs' dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import (
    DocumentIds,
    chunk_masks,
    join_time,
    masked_exp,
    single_document,
    split_time,
)
from recallax.pallas_kernels.decay import decayed_scores, log_decay_from_start, log_decay_to_end
from recallax.pallas_kernels.einsum_f32 import einsum_f32


class SimilarityKernel(NamedTuple):
    """A similarity f(q.k) = phi(q).phi(k). Both functions are applied in float32."""

    score: Callable[[Array], Array]
    """f"""
    feature_map: Callable[[Array], Array]
    """phi"""


class _LinearAttentionChunk(NamedTuple):
    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    log_decay: Float[Array, "B C H W"] | None
    document_ids: DocumentIds


class _LinearAttentionCarry(NamedTuple):
    state: Float[Array, "B H F V"] | None
    """None: zeros, so that a single chunk never computes the features of q."""
    document_index: Int[Array, " B"]


def chunked_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    *,
    kernel: SimilarityKernel,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Compute linear attention with a similarity kernel in chunks.

    Args:
        q: Queries, already scaled.
        k: Keys.
        v: Values.
        log_decay: Log-decay, W = 1 (per token) or W = K (per channel); None: no decay.
        state: Float32 state before the first token, of the width F of the features; None: zeros.
        document_ids: Documents of each row; None: one document without padding.
        kernel: The similarity kernel.
        chunk_size: Tokens of a chunk.

    Returns:
        Output in v's dtype and final state in float32.
    """
    length = q.shape[1]
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    if log_decay is not None:
        log_decay = jnp.where(document_ids.valid[..., None, None], log_decay.astype(jnp.float32), 0)
    carry = _LinearAttentionCarry(state, jnp.zeros_like(document_ids.index[:, 0]))
    row = _LinearAttentionChunk(q, k, v, log_decay, document_ids)
    if length <= chunk_size:
        final, out = _chunk(kernel, carry, row)
        return out, final
    if state is None:
        width = jax.eval_shape(kernel.feature_map, k).shape[-1]
        carry = carry._replace(state=jnp.zeros((*k.shape[:1], k.shape[2], width, v.shape[-1]), jnp.float32))
    # The end is padded with copies of the last token that are marked as padding: they neither decay nor write.
    padded = jnp.pad(document_ids.valid, ((0, 0), (0, -length % chunk_size)))
    chunks = jax.tree.map(lambda x: split_time(x, chunk_size), row)
    chunks = chunks._replace(document_ids=chunks.document_ids._replace(valid=split_time(padded, chunk_size)))
    if chunks.log_decay is not None:
        chunks = chunks._replace(log_decay=jnp.where(chunks.document_ids.valid[..., None, None], chunks.log_decay, 0))

    @jax.checkpoint  # save the states for the backward pass, not the scores
    def body(carry: _LinearAttentionCarry, chunk: _LinearAttentionChunk) -> tuple[_LinearAttentionCarry, Array]:
        state, out = _chunk(kernel, carry, chunk)
        return _LinearAttentionCarry(state, chunk.document_ids.index[:, -1]), out

    carry, out = jax.lax.scan(body, carry, chunks)
    assert carry.state is not None
    return join_time(out, length), carry.state


def _chunk(
    kernel: SimilarityKernel, carry: _LinearAttentionCarry, chunk: _LinearAttentionChunk
) -> tuple[Float[Array, "B H F V"], Float[Array, "B C H V"]]:
    """Return the state after a chunk and the chunk's output."""
    q, k, v, log_decay, docs = chunk
    dtype = v.dtype
    masks = chunk_masks(docs, carry.document_index)
    scores = decayed_scores(q, k, log_decay, masks.visible, kernel.score)
    features_k = kernel.feature_map(k.astype(jnp.float32)) * masked_exp(
        masks.in_last_document, None if log_decay is None else log_decay_to_end(log_decay)
    )
    out = einsum_f32("bhij,bjhv->bihv", scores.astype(dtype), v)
    state = einsum_f32("bjhf,bjhv->bhfv", features_k.astype(dtype), v)
    if carry.state is not None:
        from_start = None if log_decay is None else log_decay_from_start(log_decay)
        features_q = kernel.feature_map(q.astype(jnp.float32)) * masked_exp(masks.in_state_document, from_start)
        out += einsum_f32("bihf,bhfv->bihv", features_q.astype(dtype), carry.state.astype(dtype))
        total = None if from_start is None else from_start[:, -1]
        state += masked_exp(masks.keeps_state, total)[..., None] * carry.state
    return state, out.astype(dtype)
