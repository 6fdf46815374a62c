"""The gated delta rule in chunks: a triangular system inside a chunk, a carried state between chunks.

With L the cumulative log-decay, D(x)_i = exp(L_i) x_i, e = b k, and S the state at the chunk's start,

    A_ij = sum_d e_id k_jd exp(L_id - L_jd)  (j < i)      T = (I + A)^{-1}
    U = T (w V) - T D(E) S                                O = D(Q) S + A^{qk} U
    S <- exp(L_C) S + (exp(L_C - L) K)^T U

(the UT transform of DeltaNet, arXiv 2406.06484, section 3.2). T and what it multiplies are float32.
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
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.repeat_heads import repeat_heads
from recallax.pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32


class _DeltaRuleChunk(NamedTuple):
    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    erase: Float[Array, "B C H W"]
    write: Float[Array, "B C H 1"]
    log_decay: Float[Array, "B C H W2"] | None
    document_ids: DocumentIds


class _WYRepresentation(NamedTuple):
    """A chunk's effect on any incoming state."""

    q_decayed: Float[Array, "B C H K"]
    """Queries, decayed since the chunk's start, of the incoming state's document."""
    w: Float[Array, "B C H K"]
    """T D(E): what the incoming state takes away from each write."""
    u: Float[Array, "B C H V"]
    """T (w V)."""
    k_decayed: Float[Array, "B C H K"]
    """Keys, decayed until the chunk's end, of the last document."""
    scores: Float[Array, "B H C C"]
    state_decay: Float[Array, "B H W 1"]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    erase: Float[Array, "B T H W"],
    write: Float[Array, "B T H 1"],
    log_decay: Float[Array, "B T H W2"] | None,
    state: Float[Array, "B H K V"],
    document_ids: DocumentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's XLA form."""
    length = q.shape[1]
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    q, k = repeat_heads(q, k, v.shape[2], scale)
    chunk = min(CHUNK, length)
    chunks = jax.tree.map(
        lambda x: split_time(x, chunk), _DeltaRuleChunk(q, k, v, erase, write, log_decay, document_ids)
    )
    # The end is padded with copies of the last token that are marked invalid.
    filled = split_time(jnp.pad(document_ids.valid, ((0, 0), (0, -length % chunk))), chunk)
    chunks = chunks._replace(document_ids=chunks.document_ids._replace(valid=filled))

    @jax.checkpoint  # keep states for the backward, not what is computed within a chunk
    def body(carry: tuple[Array, Array], part: _DeltaRuleChunk) -> tuple[tuple[Array, Array], Array]:
        state, document = carry
        solved = _wy_representation(part, document)
        held = einsum_f32("bihk,bhkv->bihv", solved.w.astype(v.dtype), state.astype(v.dtype))
        new = (solved.u - held).astype(v.dtype)
        out = einsum_f32("bihk,bhkv->bihv", solved.q_decayed, state.astype(v.dtype))
        out += einsum_f32("bhij,bjhv->bihv", solved.scores.astype(v.dtype), new)
        state = solved.state_decay * state + einsum_f32("bjhk,bjhv->bhkv", solved.k_decayed, new)
        return (state, part.document_ids.index[:, -1]), out.astype(v.dtype)

    (state, _), out = jax.lax.scan(body, (state, jnp.zeros_like(document_ids.index[:, 0])), chunks)
    return join_time(out, length), state


def _wy_representation(part: _DeltaRuleChunk, state_document: Int[Array, " B"]) -> _WYRepresentation:
    q, k, v, erase, write, log_decay, docs = part
    valid = docs.valid[..., None, None]  # padding neither decays nor erases nor writes
    erase, write = (jnp.where(valid, x.astype(jnp.float32), 0) for x in (erase, write))
    if log_decay is not None:
        log_decay = jnp.where(valid, log_decay.astype(jnp.float32), 0)
    masks = chunk_masks(docs, state_document)
    earlier = masks.visible & ~jnp.eye(q.shape[1], dtype=bool)[None]
    total = None if log_decay is None else log_decay_from_start(log_decay)
    rest = None if log_decay is None else log_decay_to_end(log_decay)
    # The strength of erasing scales rows of the scores: in float32, after a product of the keys as they are.
    if erase.shape[-1] == 1:
        scores = decayed_scores(k, k, log_decay, earlier) * jnp.moveaxis(erase, 1, 2)
        erasers = k.astype(jnp.float32) * erase
    else:
        erasers = k.astype(jnp.float32) * erase
        scores = decayed_scores(erasers.astype(k.dtype), k, log_decay, earlier)
    inverse = unit_lower_inverse(scores)
    from_state = masked_exp(masks.in_state_document, total)
    return _WYRepresentation(
        q_decayed=(q.astype(jnp.float32) * from_state).astype(q.dtype),
        w=einsum_f32("bhij,bjhk->bihk", inverse, erasers * from_state),
        u=einsum_f32("bhij,bjhv->bihv", inverse, v.astype(jnp.float32) * write),
        k_decayed=(k.astype(jnp.float32) * masked_exp(masks.in_last_document, rest)).astype(k.dtype),
        scores=decayed_scores(q, k, log_decay, masks.visible),
        state_decay=masked_exp(masks.keeps_state, None if total is None else total[:, -1])[..., None],
    )
