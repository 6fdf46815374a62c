"""Softmax attention over a window and up to C chosen tokens of all that lie before it.

    y_i = sum_j softmax_j(scale * q_i.k_j + [j in G(i)] log sigmoid(score_j)) v_j      over i-w < j <= i and j in G(i)
    G(i) = the C largest scores among the tokens that the window of the last token of i's block does not reach

Blocks of queries share what is chosen, so the choice depends on nothing later than a block's first token. The logarithm
is how a score gets a gradient; without it (`weighed=False`) the choice is all that scores do. A score is what a token
offers, or the product of that with what the block's first token asks.

Scores that depend on the token alone never let a token back in that has left the C largest: then `TopKCache`, of
constant size, gives the same outputs as `FullCache`, which has to be kept where blocks ask.
Source: the equation of Hydra's sparse global attention is not published (arXiv 2508.15099 names a window and chosen
tokens); this is one that is causal and differentiable.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, index_documents, last_valid
from recallax.pallas_kernels.dispatch import call_implementation, require
from recallax.pallas_kernels.grid import GridBlocks, gather_tokens, grid_blocks, misaligned_rows
from recallax.pallas_kernels.sparse_global_attention import reference, xla
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


def _reference_attention(
    q,
    candidates,
    positions,
    document_ids,
    blocks,
    index,
    mask,
    grid_parts,
    block_offset,
    window,
    block_size,
    score_bias,
    top_k,
):
    place = jnp.arange(q.shape[1])[None] + (
        jnp.zeros_like(positions[:, :1]) if block_offset is None else block_offset[:, None]
    )
    ask = gather_tokens(
        jnp.moveaxis(blocks.selection_query, 0, 1), jnp.broadcast_to(place, positions.shape) // block_size
    )
    return reference.attend(q, candidates, positions, document_ids, ask, window, top_k, block_size, score_bias)


def _xla_attention(*arguments):
    *rest, _ = arguments
    return xla.blockwise(*rest)


IMPLEMENTATIONS = {"reference": _reference_attention, "xla": _xla_attention}


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
    """Output in v's dtype and what is held after these tokens (None if nothing was).

    offer, ask: float32; without `selection_query` a score is the sum of a token's offer. window: tokens that a query sees in any
    case, itself included. chosen: C. block: queries that share a choice, at most `window`; documents begin at multiples
    of it, and rows where they do not are NaN. positions: within the document; with a state the row's first one counts
    the tokens held. Raises ValueError where sizes disagree.
    """
    op = "sparse_global_attention"
    b, t, h, width = q.shape
    g = k.shape[2]
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == (b, t, g, width), f"k has shape {k.shape}; it must be {(b, t, 'G', width)}")
    require(op, v.shape[:3] == (b, t, g), f"v has shape {v.shape}; it must begin with {(b, t, g)}")
    require(op, h % g == 0, f"{h} query heads cannot share {g} key/value heads; use a divisor of {h}")
    require(
        op, selection_key.shape[:2] == (b, t), f"offer has shape {selection_key.shape}; it must begin with {(b, t)}"
    )
    require(
        op, selection_query is None or selection_query.shape == selection_key.shape, "ask must have the shape of offer"
    )
    require(
        op, 1 <= block_size <= window, f"block_size is {block_size}; it must be from 1 to the window of {window} tokens"
    )
    require(op, top_k >= 1, f"top_k is {top_k}; it must be at least 1 token")
    heap = isinstance(state, TopKCache)
    require(
        op,
        not (heap and selection_query is not None),
        "a heap forgets tokens that a later block may ask for; keep every token",
    )
    docs = index_documents(segment_ids)
    begun = None if state is None else positions[:, 0] % block_size
    parts = grid_blocks(t, block_size, begun, b)
    pool = build_candidates(state, k, v, selection_key, positions, docs)
    past = state.selection_query if isinstance(state, FullCache) else None
    blocks = _query_blocks(parts, positions, docs, selection_key, selection_query, past, block_size)
    index, mask = xla.select_tokens(pool, blocks, top_k, block_size, window)
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    arguments = (pool, positions, docs, blocks, index, mask, parts, begun, window, block_size, score_bias, top_k)
    out = call_implementation(op, IMPLEMENTATIONS, implementation, q, *arguments).astype(v.dtype)
    wrong = misaligned_rows(positions, segment_ids, parts, block_size)
    out = jnp.where(wrong[:, None, None, None], jnp.full_like(out, jnp.nan), out)
    if state is None:
        return out, None
    return out, _next_cache(
        pool, state, docs, positions, selection_key, selection_query, past, top_k, block_size, window
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
    """Nothing held yet, with a slot for each of `num_slots` tokens."""
    asked = jnp.zeros((batch, selection_dim), jnp.float32) if query_dependent else None
    return FullCache(*_init_slots(batch, num_slots, num_kv_heads, head_k_dim, head_v_dim, selection_dim, dtype), asked)


def init_topk_cache(
    batch: int, window: int, top_k: int, num_kv_heads: int, head_k_dim: int, head_v_dim: int, selection_dim: int, dtype
) -> TopKCache:
    """Nothing held yet."""
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
    """The blocks of the pieces. A piece that starts within a block asks with what that block's first token did."""
    source = grid_parts.token_index[..., 0].T
    first = gather_tokens(positions, source).T // block_size * block_size
    if selection_query is None:
        asks = jnp.ones((*first.shape, selection_key.shape[2]), selection_key.dtype)
    else:
        asks = jnp.moveaxis(gather_tokens(selection_query, source), 1, 0)
        if partial_query is not None:
            asks = jnp.where((grid_parts.offset[..., 0] > 0)[..., None], partial_query[None].astype(asks.dtype), asks)
    return QueryBlocks(gather_tokens(document_ids.index, source).T, first, asks)


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
    """What is held after these tokens."""
    last = jnp.maximum(last_valid(document_ids), 0)[:, None]
    newest = gather_tokens(positions, last)
    begin = last - newest % block_size
    asks = jnp.ones((1, *selection_key[:, 0].shape), selection_key.dtype)
    if selection_query is not None:
        asks = gather_tokens(selection_query, jnp.maximum(begin, 0))
        asks = (
            asks
            if partial_query is None
            else jnp.where((begin < 0)[..., None], partial_query[:, None].astype(asks.dtype), asks)
        )[None, :, 0]
    block = QueryBlocks(gather_tokens(document_ids.index, last).T, newest.T // block_size * block_size, asks)
    wanted = state.topk_position_plus_one.shape[1] if isinstance(state, TopKCache) else 1
    index, mask = (x[0] for x in xla.select_tokens(candidates, block, wanted, block_size, window))
    missing = wanted - index.shape[1]
    if missing > 0:
        index, mask = (jnp.pad(x, ((0, 0), (0, missing))) for x in (index, mask))
    return update_sparse_cache(candidates, state, document_ids, block, (index, mask))
