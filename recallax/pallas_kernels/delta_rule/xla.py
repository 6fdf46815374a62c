"""Gated delta rule in XLA: a triangular system within a chunk and a carried state between chunks.

With L the cumulative log-decay, D(x)_i = exp(L_i) x_i, e = b k, and S the state at the chunk's start,

    A_ij = sum_d e_id k_jd exp(L_id - L_jd)  (j < i)      T = (I + A)^{-1}
    U = T (w V) - T D(E) S                                O = D(Q) S + A^{qk} U
    S <- exp(L_C) S + (exp(L_C - L) K)^T U

(the UT transform of DeltaNet, arXiv 2406.06484, section 3.2). T and the operands of its products are float32.
"""

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
from recallax.pallas_kernels.delta_rule.reference import DeltaRuleArgs
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.grouped_heads import repeat_heads
from recallax.pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32
"""Tokens of a chunk."""


class _DeltaRuleChunk(NamedTuple):
    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    erase: Float[Array, "B C H W"]
    write: Float[Array, "B C H 1"]
    log_decay: Float[Array, "B C H W2"] | None
    document_ids: DocumentIds


class _WYRepresentation(NamedTuple):
    """Terms of a chunk's equations that do not depend on the incoming state (WY representation)."""

    q_decayed: Float[Array, "B C H K"]
    """D(Q): queries decayed from the start of the chunk; 0 outside the incoming state's document."""
    w: Float[Array, "B C H K"]
    """T D(E): its product with the incoming state is subtracted from u."""
    u: Float[Array, "B C H V"]
    """T (w V)"""
    k_decayed: Float[Array, "B C H K"]
    """exp(L_C - L) K: keys decayed to the end of the chunk; 0 outside the last document."""
    scores: Float[Array, "B H C C"]
    """A^{qk}"""
    state_decay: Float[Array, "B H W 1"]


def delta_rule(args: DeltaRuleArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute the gated delta rule in chunks.

    The arguments and the result are those of `delta_rule.reference.delta_rule`.
    """
    q, k, v, erase, write, log_decay, state, document_ids, scale = args
    length = q.shape[1]
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    q, k = repeat_heads(q, k, v.shape[2], scale)
    chunk_size = min(CHUNK, length)
    chunks = jax.tree.map(
        lambda x: split_time(x, chunk_size), _DeltaRuleChunk(q, k, v, erase, write, log_decay, document_ids)
    )
    # The end is padded with copies of the last token that are marked as padding.
    valid = split_time(jnp.pad(document_ids.valid, ((0, 0), (0, -length % chunk_size))), chunk_size)
    chunks = chunks._replace(document_ids=chunks.document_ids._replace(valid=valid))

    @jax.checkpoint  # save the states for the backward pass, not the values within a chunk
    def body(carry: tuple[Array, Array], chunk: _DeltaRuleChunk) -> tuple[tuple[Array, Array], Array]:
        state, document = carry
        solved = _wy_representation(chunk, document)
        erased = einsum_f32("bihk,bhkv->bihv", solved.w.astype(v.dtype), state.astype(v.dtype))
        new = (solved.u - erased).astype(v.dtype)
        out = einsum_f32("bihk,bhkv->bihv", solved.q_decayed, state.astype(v.dtype))
        out += einsum_f32("bhij,bjhv->bihv", solved.scores.astype(v.dtype), new)
        state = solved.state_decay * state + einsum_f32("bjhk,bjhv->bhkv", solved.k_decayed, new)
        return (state, chunk.document_ids.index[:, -1]), out.astype(v.dtype)

    (state, _), out = jax.lax.scan(body, (state, jnp.zeros_like(document_ids.index[:, 0])), chunks)
    return join_time(out, length), state


def _wy_representation(chunk: _DeltaRuleChunk, state_document: Int[Array, " B"]) -> _WYRepresentation:
    q, k, v, erase, write, log_decay, docs = chunk
    valid = docs.valid[..., None, None]  # padding neither decays nor erases nor writes
    erase, write = (jnp.where(valid, x.astype(jnp.float32), 0) for x in (erase, write))
    if log_decay is not None:
        log_decay = jnp.where(valid, log_decay.astype(jnp.float32), 0)
    masks = chunk_masks(docs, state_document)
    strictly_lower = masks.visible & ~jnp.eye(q.shape[1], dtype=bool)[None]
    from_start = None if log_decay is None else log_decay_from_start(log_decay)
    to_end = None if log_decay is None else log_decay_to_end(log_decay)
    # A strength per token scales rows of the float32 scores, so that the keys are not rounded once more.
    if erase.shape[-1] == 1:
        scores = decayed_scores(k, k, log_decay, strictly_lower) * jnp.moveaxis(erase, 1, 2)
        erase_k = k.astype(jnp.float32) * erase
    else:
        erase_k = k.astype(jnp.float32) * erase
        scores = decayed_scores(erase_k.astype(k.dtype), k, log_decay, strictly_lower)
    inverse = unit_lower_inverse(scores)
    from_state_factor = masked_exp(masks.in_state_document, from_start)
    return _WYRepresentation(
        q_decayed=(q.astype(jnp.float32) * from_state_factor).astype(q.dtype),
        w=einsum_f32("bhij,bjhk->bihk", inverse, erase_k * from_state_factor),
        u=einsum_f32("bhij,bjhv->bihv", inverse, v.astype(jnp.float32) * write),
        k_decayed=(k.astype(jnp.float32) * masked_exp(masks.in_last_document, to_end)).astype(k.dtype),
        scores=decayed_scores(q, k, log_decay, masks.visible),
        state_decay=masked_exp(masks.keeps_state, None if from_start is None else from_start[:, -1])[..., None],
    )
