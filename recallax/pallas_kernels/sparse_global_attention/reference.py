"""Definition of sparse global attention: the scores of all pairs, and the rank of every candidate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype
from recallax.pallas_kernels.masked_logit import MASKED_LOGIT
from recallax.pallas_kernels.sparse_global_attention.selection_candidates import (
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
    """Compute sparse global attention token by token.

    Args:
        q: Scaled queries.
        candidates: The candidates.
        positions: Positions of the queries within documents.
        document_ids: Documents of the row.
        selection_query: Selection query of each token's block.
        window: Tokens of the window.
        top_k: Tokens that are selected for a block.
        block_size: Tokens of a block.
        score_bias: Add log sigmoid(score) to the logits of selected tokens.
    """
    dtype = accumulator_dtype(q.dtype)

    def token(q: Array, position: Array, document: Array, query: Array) -> Array:
        scores = selection_scores(candidates.selection_key, query[:, None])
        candidate = candidate_mask(candidates, document, position // block_size * block_size, block_size, window)
        order = jnp.argsort(jnp.where(candidate, -jax.lax.stop_gradient(scores), -MASKED_LOGIT), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        distance = position[:, None] - candidates.position
        in_window = (candidates.document_index == document[:, None]) & (distance >= 0) & (distance < window)
        selected = candidate & (rank < top_k) & (distance >= window)
        bias = jnp.where(selected & score_bias, jax.nn.log_sigmoid(scores).astype(dtype), 0)
        return _softmax(q, candidates.k, candidates.v, in_window | selected, bias, dtype)

    return jax.vmap(token, in_axes=1, out_axes=1)(q, positions, document_ids.index, selection_query)


def _softmax(
    q: Float[Array, "B H K"],
    k: Float[Array, "B P G K"],
    v: Float[Array, "B P G V"],
    visible: Bool[Array, "B P"],
    bias: Float[Array, "B P"],
    dtype,
) -> Float[Array, "B H V"]:
    k, v = (jnp.repeat(x.astype(dtype), q.shape[1] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bhk,bphk->bhp", q.astype(dtype), k) + bias[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, MASKED_LOGIT), axis=-1)
    return jnp.einsum("bhp,bphv->bhv", jnp.where(visible[:, None], weights, 0), v)
