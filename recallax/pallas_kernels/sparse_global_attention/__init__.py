"""Softmax attention over a sliding window and up to C selected earlier tokens.

    y_i = sum_j softmax_j(scale * q_i.k_j + [j in G(i)] log sigmoid(score_j)) v_j      over i-w < j <= i and j in G(i)
    G(i) = the C tokens with the largest scores among those before the window of the last token of i's block

All queries of a block share a selection, which depends on no token after the first one of the block. The score bias,
log sigmoid(score), gives the scores a gradient; without it (`score_bias=False`) scores have none. A score is the sum of
a token's selection key, or its product with the selection query of the block's first token.

If scores depend on the token only, a token that has left the C largest never returns. Then `TopKCache`, of constant
size, gives the same outputs as `FullCache`. With selection queries `FullCache` is required.
Source: the equation of Hydra's sparse global attention is not published (arXiv 2508.15099 mentions a window and
selected tokens); this one is causal and differentiable.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, index_documents, last_valid
from recallax.pallas_kernels.dispatch import call_implementation, require
from recallax.pallas_kernels.grid import GridBlocks, gather_tokens, grid_blocks, misaligned_rows
from recallax.pallas_kernels.grouped_heads import check_grouped_queries
from recallax.pallas_kernels.sparse_global_attention import reference, xla
from recallax.pallas_kernels.sparse_global_attention.reference import SparseGlobalArgs
from recallax.pallas_kernels.sparse_global_attention.selection_candidates import (
    FullCache,
    QueryBlocks,
    SelectionCandidates,
    SparseGlobalCache,
    TopKCache,
    build_candidates,
    update_sparse_cache,
)

__all__ = [
    "IMPLEMENTATIONS",
    "FullCache",
    "SparseGlobalCache",
    "TopKCache",
    "init_full_cache",
    "init_topk_cache",
    "sparse_global_attention",
]


OP = "sparse_global_attention"
IMPLEMENTATIONS = {"reference": reference.sparse_global_attention, "xla": xla.sparse_global_attention}


def sparse_global_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    selection_key: Float[Array, "B T R"],
    selection_query: Float[Array, "B T R"] | None = None,
    *,
    window: int,
    top_k: int,
    block_size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    state: SparseGlobalCache | None = None,
    score_bias: bool = True,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], SparseGlobalCache | None]:
    """Compute sparse global attention over whole rows.

    Args:
        q: Queries of H heads, which share G key/value heads.
        k: Keys.
        v: Values.
        selection_key: Float32 selection key of each token.
        selection_query: Float32 selection query of each token; None: the score is the sum of the selection key.
        window: Tokens of the window, the query included.
        top_k: Upper bound C of the tokens that are selected for a block.
        block_size: Queries that share a selection, at most `window`; documents start at its multiples (else NaN).
        positions: Positions within documents. The first position of a row is the number of tokens in its state.
        segment_ids: Document ids; 0 is padding.
        state: Cache of the row's first document before the row; None: no tokens.
        score_bias: Add log sigmoid(score) to the logits of selected tokens.
        scale: Factor of q; None: K**-0.5.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output in v's dtype, and the cache after these tokens (None without a state).

    Raises:
        ValueError: Shapes or sizes do not match, or selection queries are given with a `TopKCache`.
    """
    _check_shapes(OP, q, k, v, selection_key, selection_query)
    _check_selection(OP, window, top_k, block_size, state, selection_query)
    docs = index_documents(segment_ids)
    block_offset = None if state is None else positions[:, 0] % block_size
    parts = grid_blocks(q.shape[1], block_size, block_offset, q.shape[0])
    candidates = build_candidates(state, k, v, selection_key, positions, docs)
    past = state.selection_query if isinstance(state, FullCache) else None
    blocks = _query_blocks(parts, positions, docs, selection_key, selection_query, past, block_size)
    index, mask = xla.select_tokens(candidates, blocks, top_k, block_size, window)
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    arrays = (q, candidates, positions, docs, blocks, index, mask, parts, block_offset)
    args = SparseGlobalArgs(*arrays, window, block_size, score_bias, top_k)
    out = call_implementation(OP, IMPLEMENTATIONS, implementation, args).astype(v.dtype)
    wrong = misaligned_rows(positions, segment_ids, parts, block_size)
    out = jnp.where(wrong[:, None, None, None], jnp.full_like(out, jnp.nan), out)
    if state is None:
        return out, None
    inputs = (positions, selection_key, selection_query, past)
    return out, _next_cache(candidates, state, docs, *inputs, top_k, block_size, window)


def _check_shapes(op: str, q: Array, k: Array, v: Array, selection_key: Array, selection_query: Array | None) -> None:
    """Raise ValueError unless the shapes match."""
    b, t = q.shape[:2]
    check_grouped_queries(op, q, k, v)
    shape = selection_key.shape
    require(op, shape[:2] == (b, t), f"selection_key has shape {shape}; it must begin with {(b, t)}")
    same_shape = selection_query is None or selection_query.shape == shape
    require(op, same_shape, "selection_query must have the shape of selection_key")


def _check_selection(
    op: str,
    window: int,
    top_k: int,
    block_size: int,
    state: SparseGlobalCache | None,
    selection_query: Array | None,
) -> None:
    """Raise ValueError unless the sizes and the cache fit the selection."""
    require(op, 1 <= block_size <= window, f"block_size is {block_size}; it must be from 1 to the window of {window}")
    require(op, top_k >= 1, f"top_k is {top_k}; it must be at least 1")
    require(
        op,
        not (isinstance(state, TopKCache) and selection_query is not None),
        "TopKCache does not support selection_query: a later block may select a dropped token; use FullCache",
    )


def init_full_cache(
    batch: int,
    num_slots: int,
    num_kv_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    selection_dim: int,
    query_dependent: bool,
    dtype,
) -> FullCache:
    """Return an empty cache of all tokens.

    Args:
        batch: Number of rows.
        num_slots: Upper bound of the tokens of a document.
        num_kv_heads: Number of key/value heads.
        head_k_dim: Width of keys.
        head_v_dim: Width of values.
        selection_dim: Width of selection keys and queries.
        query_dependent: Selection queries are used.
        dtype: Dtype of keys and values.
    """
    partial_query = jnp.zeros((batch, selection_dim), jnp.float32) if query_dependent else None
    return FullCache(
        *_init_slots(batch, num_slots, num_kv_heads, head_k_dim, head_v_dim, selection_dim, dtype), partial_query
    )


def init_topk_cache(
    batch: int, window: int, top_k: int, num_kv_heads: int, head_k_dim: int, head_v_dim: int, selection_dim: int, dtype
) -> TopKCache:
    """Return an empty cache of the window and the selected tokens.

    Args:
        batch: Number of rows.
        window: Tokens of the window.
        top_k: Upper bound of the selected tokens.
        num_kv_heads: Number of key/value heads.
        head_k_dim: Width of keys.
        head_v_dim: Width of values.
        selection_dim: Width of selection keys.
        dtype: Dtype of keys and values.
    """
    recent, best = (
        _init_slots(batch, n, num_kv_heads, head_k_dim, head_v_dim, selection_dim, dtype) for n in (window, top_k)
    )
    return TopKCache(*recent, *best, jnp.zeros((batch, top_k), jnp.int32))


def _init_slots(
    batch: int, num_slots: int, num_kv_heads: int, head_k_dim: int, head_v_dim: int, selection_dim: int, dtype
) -> tuple[Float[Array, "B N G K"], Float[Array, "B N G V"], Float[Array, "B N R"]]:
    k, v = (jnp.zeros((batch, num_slots, num_kv_heads, n), dtype) for n in (head_k_dim, head_v_dim))
    return k, v, jnp.zeros((batch, num_slots, selection_dim), jnp.float32)


def _query_blocks(
    grid_parts: GridBlocks,
    positions: Int[Array, "B T"],
    document_ids: DocumentIds,
    selection_key: Float[Array, "B T R"],
    selection_query: Float[Array, "B T R"] | None,
    partial_query: Float[Array, "B R"] | None,
    block_size: int,
) -> QueryBlocks:
    """Return the blocks of queries; an incomplete first block uses the selection query stored in the state."""
    source = grid_parts.token_index[..., 0].T
    first = gather_tokens(positions, source).T // block_size * block_size
    if selection_query is None:
        queries = jnp.ones((*first.shape, selection_key.shape[2]), selection_key.dtype)
    else:
        queries = jnp.moveaxis(gather_tokens(selection_query, source), 1, 0)
        if partial_query is not None:
            queries = jnp.where(
                (grid_parts.offset[..., 0] > 0)[..., None], partial_query[None].astype(queries.dtype), queries
            )
    return QueryBlocks(gather_tokens(document_ids.index, source).T, first, queries)


def _next_cache(
    candidates: SelectionCandidates,
    state: SparseGlobalCache,
    document_ids: DocumentIds,
    positions: Int[Array, "B T"],
    selection_key: Float[Array, "B T R"],
    selection_query: Float[Array, "B T R"] | None,
    partial_query: Float[Array, "B R"] | None,
    top_k: int,
    block_size: int,
    window: int,
) -> SparseGlobalCache:
    """Return the cache after these tokens."""
    last = jnp.maximum(last_valid(document_ids), 0)[:, None]
    newest = gather_tokens(positions, last)
    block_start = last - newest % block_size
    queries = jnp.ones((1, *selection_key[:, 0].shape), selection_key.dtype)
    if selection_query is not None:
        queries = gather_tokens(selection_query, jnp.maximum(block_start, 0))
        queries = (
            queries
            if partial_query is None
            else jnp.where((block_start < 0)[..., None], partial_query[:, None].astype(queries.dtype), queries)
        )[None, :, 0]
    block = QueryBlocks(gather_tokens(document_ids.index, last).T, newest.T // block_size * block_size, queries)
    num_selected = state.topk_position_plus_one.shape[1] if isinstance(state, TopKCache) else 1
    index, mask = (x[0] for x in xla.select_tokens(candidates, block, num_selected, block_size, window))
    missing = num_selected - index.shape[1]
    if missing > 0:
        index, mask = (jnp.pad(x, ((0, 0), (0, missing))) for x in (index, mask))
    return update_sparse_cache(candidates, state, document_ids, block, (index, mask))
