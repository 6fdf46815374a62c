"""Definition of sparse global attention: the scores of all pairs, and the rank of every candidate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype
from recallax.pallas_kernels.grid import GridBlocks, gather_tokens
from recallax.pallas_kernels.masked_logit import MASKED_LOGIT
from recallax.pallas_kernels.sparse_global_attention.selection_candidates import (
    QueryBlocks,
    SelectionCandidates,
    candidate_mask,
    selection_scores,
)


class SparseGlobalArgs(NamedTuple):
    """Checked arguments of an implementation of `sparse_global_attention`."""

    q: Float[Array, "B T H K"]
    """Scaled queries."""
    candidates: SelectionCandidates
    positions: Int[Array, "B T"]
    """Positions of the queries within documents."""
    document_ids: DocumentIds
    blocks: QueryBlocks
    """Blocks of queries, which share a selection."""
    selected: Int[Array, "N B C"]
    """Indices of the selected candidates of each block."""
    is_selected: Bool[Array, "N B C"]
    """True for valid indices; a block may have fewer than C candidates."""
    grid_parts: GridBlocks
    """Tokens of the row in each block."""
    block_offset: Int[Array, " B"] | None
    """Tokens of each row's first block before the row; None: 0."""
    window: int
    """Tokens of the window, the query included."""
    block_size: int
    score_bias: bool
    """Add log sigmoid(score) to the logits of selected tokens."""
    top_k: int
    """Upper bound C of the tokens that are selected for a block."""


def sparse_global_attention(args: SparseGlobalArgs) -> Float[Array, "B T H V"]:
    """Compute sparse global attention token by token; the selection is computed again, by rank."""
    q, candidates, positions, block_size = args.q, args.candidates, args.positions, args.block_size
    window, top_k, score_bias = args.window, args.top_k, args.score_bias
    offset = jnp.zeros_like(positions[:, 0]) if args.block_offset is None else args.block_offset
    block_index = (jnp.arange(q.shape[1])[None] + offset[:, None]) // block_size
    selection_query = gather_tokens(jnp.moveaxis(args.blocks.selection_query, 0, 1), block_index)
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

    return jax.vmap(token, in_axes=1, out_axes=1)(q, positions, args.document_ids.index, selection_query)


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
