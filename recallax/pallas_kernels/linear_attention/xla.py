"""Linear attention in chunks: quadratic inside a chunk, a carried state between chunks.

With L the cumulative log-decay of the chunk, s_ij = q_i.k_j and S the state at its start,

    o_i = exp(L_i) S^T phi(q_i) + sum_{j<=i} exp(L_i - L_j) f(s_ij) v_j
    S  <- exp(L_C) S + sum_j exp(L_C - L_j) phi(k_j) v_j^T

where f(q.k) = phi(q).phi(k); plain linear attention has f and phi the identity, BASED a polynomial and its features,
which are then built for the carried state only. A decay per channel goes inside the scores
(`decay.py`). Sums are float32; operands of products have the inputs' dtype.
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
from recallax.pallas_kernels.repeat_heads import repeat_heads


class SimilarityKernel(NamedTuple):
    """A similarity f(q.k) = phi(q).phi(k); both functions are applied in float32."""

    score: Callable[[Array], Array]
    feature_map: Callable[[Array], Array]


IDENTITY_KERNEL = SimilarityKernel(lambda s: s, lambda x: x)
CHUNK = 64
CHANNEL_CHUNK = 32
"""With a decay per channel, whose scores cost more per pair."""


class _LinearAttentionChunk(NamedTuple):
    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    log_decay: Float[Array, "B C H W"] | None
    document_ids: DocumentIds


class _LinearAttentionCarry(NamedTuple):
    state: Float[Array, "B H F V"] | None  # None: empty, so that a single chunk never builds its features of q
    document_index: Int[Array, " B"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The op's XLA form; `state` is float32; None is empty. log_decay: W is 1 (per token) or K (per channel)."""
    per_channel = log_decay is not None and log_decay.shape[-1] > 1
    q, k = repeat_heads(q, k, v.shape[2], scale)
    chunk = min(CHUNK, CHANNEL_CHUNK) if per_channel else CHUNK
    return chunked_linear_attention(q, k, v, log_decay, state, document_ids, kernel=IDENTITY_KERNEL, chunk_size=chunk)


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
    """The same for any kernel; the state has the width of its features."""
    length = q.shape[1]
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    if log_decay is not None:
        log_decay = jnp.where(document_ids.valid[..., None, None], log_decay.astype(jnp.float32), 0)
    carry = _LinearAttentionCarry(state, jnp.zeros_like(document_ids.index[:, 0]))
    whole = _LinearAttentionChunk(q, k, v, log_decay, document_ids)
    if length <= chunk_size:
        final, out = _chunk(kernel, carry, whole)
        return out, final
    if state is None:
        width = jax.eval_shape(kernel.feature_map, k).shape[-1]
        carry = carry._replace(state=jnp.zeros((*k.shape[:1], k.shape[2], width, v.shape[-1]), jnp.float32))
    # The end is padded with copies of the last token that are marked invalid: they neither decay nor write.
    padded = jnp.pad(document_ids.valid, ((0, 0), (0, -length % chunk_size)))
    chunks = jax.tree.map(lambda x: split_time(x, chunk_size), whole)
    chunks = chunks._replace(document_ids=chunks.document_ids._replace(valid=split_time(padded, chunk_size)))
    if chunks.log_decay is not None:
        chunks = chunks._replace(log_decay=jnp.where(chunks.document_ids.valid[..., None, None], chunks.log_decay, 0))

    @jax.checkpoint  # keep states, not scores, for the backward
    def body(carry: _LinearAttentionCarry, part: _LinearAttentionChunk) -> tuple[_LinearAttentionCarry, Array]:
        state, out = _chunk(kernel, carry, part)
        return _LinearAttentionCarry(state, part.document_ids.index[:, -1]), out

    carry, out = jax.lax.scan(body, carry, chunks)
    assert carry.state is not None
    return join_time(out, length), carry.state


def _chunk(
    kernel: SimilarityKernel, carry: _LinearAttentionCarry, part: _LinearAttentionChunk
) -> tuple[Float[Array, "B H F V"], Float[Array, "B C H V"]]:
    q, k, v, decay, docs = part
    dtype = v.dtype
    masks = chunk_masks(docs, carry.document_index)
    scores = decayed_scores(q, k, decay, masks.visible, kernel.score)
    features_k = kernel.feature_map(k.astype(jnp.float32)) * masked_exp(
        masks.in_last_document, None if decay is None else log_decay_to_end(decay)
    )
    out = einsum_f32("bhij,bjhv->bihv", scores.astype(dtype), v)
    state = einsum_f32("bjhf,bjhv->bhfv", features_k.astype(dtype), v)
    if carry.state is not None:
        total = None if decay is None else log_decay_from_start(decay)
        features_q = kernel.feature_map(q.astype(jnp.float32)) * masked_exp(masks.in_state_document, total)
        out += einsum_f32("bihf,bhfv->bihv", features_q.astype(dtype), carry.state.astype(dtype))
        state += masked_exp(masks.keeps_state, None if total is None else total[:, -1])[..., None] * carry.state
    return state, out.astype(dtype)
