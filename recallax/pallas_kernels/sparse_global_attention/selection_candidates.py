"""Candidates of sparse global attention, which are the tokens of the cache and of the row, and updates of the cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, last_valid
from recallax.pallas_kernels.grid import gather_tokens
from recallax.pallas_kernels.kv_cache import cached_positions


class FullCache(NamedTuple):
    """Cache of all tokens of a document: position p is in slot p."""

    k: Float[Array, "B N G K"]
    v: Float[Array, "B N G V"]
    selection_key: Float[Array, "B N R"]
    selection_query: Float[Array, "B R"] | None
    """Selection query of the incomplete block; None without selection queries."""


class TopKCache(NamedTuple):
    """Cache of the window, position p in slot p mod W, and of the tokens selected for the newest block, by time."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G V"]
    selection_key: Float[Array, "B W R"]
    topk_k: Float[Array, "B C G K"]
    topk_v: Float[Array, "B C G V"]
    topk_selection_key: Float[Array, "B C R"]
    topk_position_plus_one: Int[Array, "B C"]
    """1 + position of the selected token; 0 for empty slots."""


type SparseGlobalCache = FullCache | TopKCache


class SelectionCandidates(NamedTuple):
    """P candidates in temporal order: those of the cache, then the tokens of the row."""

    k: Float[Array, "B P G K"]
    v: Float[Array, "B P G V"]
    selection_key: Float[Array, "B P R"]
    position: Int[Array, "B P"]
    document_index: Int[Array, "B P"]
    """Index of the document in the row, 0 for cached tokens; -1 for entries without a token."""
    first_new: int
    """Index of the first token of the row."""


class QueryBlocks(NamedTuple):
    """Blocks of queries: document, start and selection query of each."""

    document_index: Int[Array, "N B"]
    start_position: Int[Array, "N B"]
    """Position of the first token of the block."""
    selection_query: Float[Array, "N B R"]


def build_candidates(
    cache: SparseGlobalCache | None,
    k: Array,
    v: Array,
    selection_key: Array,
    positions: Int[Array, "B T"],
    document_ids: DocumentIds,
) -> SelectionCandidates:
    """Concatenate the tokens of the cache and of the row.

    Args:
        cache: Cache before the row; None: no tokens.
        k: Keys of the row [B, T, G, K].
        v: Values of the row [B, T, G, V].
        selection_key: Selection keys of the row [B, T, R].
        positions: Positions within documents.
        document_ids: Documents of the row.
    """
    new = SelectionCandidates(k, v, selection_key, positions, jnp.where(document_ids.valid, document_ids.index, -1), 0)
    if cache is None:
        return new
    seen, slots = positions[:, 0], cache.k.shape[1]  # padding is on the right
    recent = seen[:, None] - slots + jnp.arange(slots, dtype=seen.dtype)[None]
    at = recent % slots
    parts = [
        _cached_candidates(
            gather_tokens(cache.k, at),
            gather_tokens(cache.v, at),
            gather_tokens(cache.selection_key, at),
            recent,
            recent >= 0,
        )
    ]
    if isinstance(cache, TopKCache):
        position = cache.topk_position_plus_one - 1
        older = (position >= 0) & (position < recent[:, :1])  # tokens in the window are not listed twice
        parts.insert(0, _cached_candidates(cache.topk_k, cache.topk_v, cache.topk_selection_key, position, older))
    columns = zip(*parts, new[:5], strict=True)
    k, v, selection_key, position, document = (
        jnp.concatenate([*(x.astype(y.dtype) for x in old), y], axis=1) for *old, y in columns
    )
    return SelectionCandidates(k, v, selection_key, position, document, sum(part[0].shape[1] for part in parts))


def _cached_candidates(
    k: Array, v: Array, selection_key: Array, position: Array, valid: Bool[Array, "B N"]
) -> tuple[Array, ...]:
    """Return the candidates of cache slots; empty slots may contain NaN and are set to 0."""
    k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
    return k, v, jnp.where(valid[..., None], selection_key, 0), position, jnp.where(valid, 0, -1)


def selection_scores(
    selection_key: Float[Array, "... R"], selection_query: Float[Array, "... R"]
) -> Float[Array, "..."]:
    """Return the score of a token for a block, the product of selection key and query, in their dtype."""
    return jnp.sum(selection_key * selection_query, axis=-1)


def candidate_mask(
    candidates: SelectionCandidates,
    document: Int[Array, " B"],
    block_start: Int[Array, " B"],
    block_size: int,
    window: int,
) -> Bool[Array, "B P"]:
    """Return True for the tokens that are before the window of the last token of the block.

    Args:
        candidates: The candidates.
        document: Document index of each row's block.
        block_start: Position of the first token of the block.
        block_size: Tokens of a block.
        window: Tokens of the window.
    """
    return (candidates.document_index == document[:, None]) & (
        candidates.position < block_start[:, None] + block_size - window
    )


def update_sparse_cache(
    candidates: SelectionCandidates,
    cache: SparseGlobalCache,
    document_ids: DocumentIds,
    blocks: QueryBlocks,
    chosen: tuple[Array, Array],
) -> SparseGlobalCache:
    """Return the cache after the row, which stores each row's last document.

    Rows without valid tokens keep their cache.

    Args:
        candidates: The candidates.
        cache: Cache before the row.
        document_ids: Documents of the row.
        blocks: The newest block of each row's last document.
        chosen: Indices and mask of the candidates selected for that block.
    """
    last = last_valid(document_ids)
    newest = jnp.take_along_axis(candidates.position, candidates.first_new + jnp.maximum(last, 0)[:, None], axis=1)
    position = cached_positions(newest[:, 0] + 1, cache.k.shape[1])
    index = candidates.first_new + last[:, None] - (newest - position)
    recent = _gather_candidates(candidates, index, position >= 0)
    if isinstance(cache, FullCache):
        after: SparseGlobalCache = FullCache(
            *recent, None if cache.selection_query is None else blocks.selection_query[0]
        )
    else:
        index, mask = chosen
        number = jnp.where(mask, gather_tokens(candidates.position, index) + 1, 0)
        after = TopKCache(*recent, *_gather_candidates(candidates, index, mask), number)
    empty_row = last < 0

    def keep(old: Array, new: Array) -> Array:
        return jnp.where(empty_row.reshape(-1, *[1] * (old.ndim - 1)), old, new.astype(old.dtype))

    return jax.tree.map(keep, cache, after)


def _gather_candidates(
    candidates: SelectionCandidates, index: Int[Array, "B N"], mask: Bool[Array, "B N"]
) -> tuple[Array, Array, Array]:
    index = jnp.clip(index, 0, candidates.k.shape[1] - 1)
    k, v, offer = (gather_tokens(x, index) for x in candidates[:3])
    k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))
    return k, v, jnp.where(mask[..., None], offer, 0)
