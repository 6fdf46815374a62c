"""The definition of sparse global attention: every score of every pair, and every token's rank among the candidates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype
from recallax.pallas_kernels.sparse_global_attention.selection_candidates import (
    MASKED_LOGIT,
    SelectionCandidates,
    candidate_mask,
    selection_scores,
)


def attend(
    q: Float[Array, "B T H K"],
    candidates: SelectionCandidates,
    positions: Int[Array, "B T"],
    document_ids: DocumentIds,
    selection_query: Float[Array, "B T R"],
    window: int,
    top_k: int,
    block_size: int,
    score_bias: bool,
) -> Float[Array, "B T H V"]:
    """Token by token; `selection_query` is that of each token's block. q is scaled already."""
    wide = accumulator_dtype(q.dtype)

    def token(q: Array, at: Array, document: Array, ask: Array) -> Array:
        wanted = selection_scores(candidates.selection_key, ask[:, None])
        candidate = candidate_mask(candidates, document, at // block_size * block_size, block_size, window)
        order = jnp.argsort(jnp.where(candidate, -jax.lax.stop_gradient(wanted), -MASKED_LOGIT), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        distance = at[:, None] - candidates.position
        near = (candidates.document_index == document[:, None]) & (distance >= 0) & (distance < window)
        far = candidate & (rank < top_k) & (distance >= window)
        bias = jnp.where(far & score_bias, jax.nn.log_sigmoid(wanted).astype(wide), 0)
        return _softmax(q, candidates.k, candidates.v, near | far, bias, wide)

    return jax.vmap(token, in_axes=1, out_axes=1)(q, positions, document_ids.index, selection_query)


def _softmax(
    q: Float[Array, "B H K"],
    k: Float[Array, "B P G K"],
    v: Float[Array, "B P G V"],
    visible: Bool[Array, "B P"],
    bias: Float[Array, "B P"],
    wide,
) -> Float[Array, "B H V"]:
    k, v = (jnp.repeat(x.astype(wide), q.shape[1] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bhk,bphk->bhp", q.astype(wide), k) + bias[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED_LOGIT), axis=-1)
    return jnp.einsum("bhp,bphv->bhv", jnp.where(visible[:, None], weights, 0), v)
