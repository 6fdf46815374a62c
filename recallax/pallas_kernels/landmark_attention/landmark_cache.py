"""Updates of the landmark cache by a row of tokens or by one token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, index_documents, last_valid
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkBlocks, LandmarkCache, complete_blocks
from recallax.types import DType


def init_landmark_cache(
    batch: int, max_len: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: DType
) -> LandmarkCache:
    """Return an empty cache.

    Args:
        batch: Number of rows.
        max_len: Upper bound of the tokens of a document, including landmarks.
        block_size: Tokens of a block besides its landmark.
        num_kv_heads: Number of key/value heads.
        head_dim: Width of keys and values.
        dtype: Dtype of keys and values.
    """
    count = max(1, max_len // (block_size + 1))
    landmark_k = jnp.zeros((batch, count, num_kv_heads, head_dim), dtype)
    block, partial = (
        jnp.zeros((*lead, block_size, num_kv_heads, head_dim), dtype) for lead in ((batch, count), (batch,))
    )
    return LandmarkCache(landmark_k, block, block, partial, partial)


def cache_slot_sources(
    blocks: LandmarkBlocks, document_ids: DocumentIds, positions: Int[Array, "B T"], block_size: int, num_slots: int
) -> Int[Array, "B N"]:
    """Return the index of the block that each slot of the cache stores after the row, which is of its last document.

    Args:
        blocks: All complete blocks; the first `num_slots` are those of the cache.
        document_ids: Documents of the row.
        positions: Positions within documents.
        block_size: Tokens of a block besides its landmark.
        num_slots: Slots of the cache.

    Returns:
        Indices into `blocks`; the number of blocks for empty slots.
    """
    size, count = block_size + 1, blocks.landmark_time.shape[1]
    last = jnp.maximum(last_valid(document_ids), 0)[:, None]
    final, seen = (jnp.take_along_axis(x, last, axis=1) for x in (document_ids.index, positions + 1))
    old = jnp.where(final == 0, positions[:, :1] // size, 0)
    new = (
        (blocks.document_index == final)
        & (blocks.landmark_time >= 0)
        & (blocks.landmark_time < document_ids.index.shape[1])
    )
    first = jnp.argmax(new, axis=1, keepdims=True)
    slot = jnp.arange(num_slots)[None]
    source = jnp.where(slot < old, slot, first + slot - old)
    source = jnp.where(slot < seen // size, source, count)
    return jnp.where(document_ids.valid.any(axis=1, keepdims=True), source, slot)


def update_landmark_cache(
    cache: LandmarkCache,
    blocks: LandmarkBlocks,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds,
    positions: Int[Array, "B T"],
) -> LandmarkCache:
    """Return the cache after T more tokens. Rows without valid tokens keep their cache; empty slots are zero.

    Args:
        cache: Cache before these tokens.
        blocks: All complete blocks, of the cache and of the row.
        k: Keys of the row.
        v: Values of the row.
        document_ids: Documents of the row.
        positions: Positions within documents.
    """
    slots, block_size = cache.k.shape[1:3]
    source = cache_slot_sources(blocks, document_ids, positions, block_size, slots)
    empty_row = ~document_ids.valid.any(axis=1)

    def complete(old: Array, x: Array) -> Array:
        trailing_axes = [1] * (x.ndim - 2)
        index = jnp.minimum(source, x.shape[1] - 1).reshape(*source.shape, *trailing_axes)
        filled = (source < x.shape[1]).reshape(*source.shape, *trailing_axes)
        new = jnp.where(filled, jnp.take_along_axis(x, index, axis=1), 0).astype(old.dtype)
        return jnp.where(empty_row.reshape(-1, *[1] * (x.ndim - 1)), old, new)

    last = jnp.maximum(last_valid(document_ids), 0)[:, None]
    last_offset = jnp.take_along_axis(positions, last, axis=1) % (block_size + 1)
    offset = jnp.arange(block_size)[None]
    time = last - last_offset + offset
    in_partial = (offset <= last_offset) & (last_offset < block_size)

    def partial(old: Array, x: Array) -> Array:
        new = jnp.take_along_axis(x, jnp.maximum(time, 0)[..., None, None], axis=1).astype(old.dtype)
        new = jnp.where((time >= 0)[..., None, None], new, old)
        new = jnp.where(in_partial[..., None, None], new, 0)
        return jnp.where(empty_row[:, None, None, None], old, new)

    landmark_k, keys, values = (complete(old, x) for old, x in zip(cache[:3], blocks[:3], strict=True))
    return LandmarkCache(landmark_k, keys, values, partial(cache.partial_k, k), partial(cache.partial_v, v))


def append_to_partial_block(
    cache: LandmarkCache,
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> LandmarkCache:
    """Append one token of each active row to its incomplete block; a landmark is not stored there.

    Args:
        cache: Cache before the token.
        k: Key of each row.
        v: Value of each row.
        position: Position of the token within its document.
        active: Rows that have a token; the others keep their cache.
    """
    block_size = cache.partial_k.shape[1]
    offset = position % (block_size + 1)
    slot = (jnp.arange(block_size)[None] == offset[:, None]) & active[:, None]
    block_starts = (active & (offset == 0))[:, None, None, None]

    def append(partial: Array, new: Array) -> Array:
        partial = jnp.where(block_starts, 0, partial)
        return jnp.where(slot[..., None, None], new[:, None].astype(partial.dtype), partial)

    return cache._replace(partial_k=append(cache.partial_k, k), partial_v=append(cache.partial_v, v))


def close_partial_block(
    cache: LandmarkCache, k: Float[Array, "B G K"], position: Int[Array, " B"], active: Bool[Array, " B"]
) -> LandmarkCache:
    """Move the incomplete block of each active row to the complete ones if this token is its landmark.

    Args:
        cache: Cache before the token.
        k: Key of the landmark of each row.
        position: Position of the token within its document.
        active: Rows that have a token; the others keep their cache.
    """
    slots, block_size = cache.k.shape[1:3]
    closes = active & (position % (block_size + 1) == block_size)
    slot = jnp.where(
        closes, position // (block_size + 1), slots
    )  # out of range, which is dropped, if it does not close
    row = jnp.arange(position.shape[0])

    def store(blocks: Array, block: Array) -> Array:
        return blocks.at[row, slot].set(block.astype(blocks.dtype), mode="drop")

    def clear(partial: Array) -> Array:
        return jnp.where(closes[:, None, None, None], 0, partial)

    keys, values = store(cache.k, cache.partial_k), store(cache.v, cache.partial_v)
    return LandmarkCache(store(cache.landmark_k, k), keys, values, clear(cache.partial_k), clear(cache.partial_v))


def cached_and_new_blocks(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: LandmarkCache,
) -> LandmarkBlocks:
    """Return the blocks of the cache and those whose landmark is in the row.

    Args:
        k: Keys of the row, rotated as in the cache.
        v: Values of the row.
        segment_ids: Document ids; 0 is padding.
        positions: Positions within documents.
        cache: Blocks of the row's first document before the row.
    """
    return complete_blocks(k, v, index_documents(segment_ids), positions, cache.partial_k.shape[1], cache)


def update_cache_and_log_probs(
    cache: LandmarkCache,
    log_probs: Float[Array, "B H N"] | None,
    blocks: LandmarkBlocks,
    block_log_probs: Float[Array, "B H M"] | None,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[LandmarkCache, Float[Array, "B H N"] | None]:
    """Return the cache after T more tokens, and the largest log-probability of each of its blocks.

    Args:
        cache: Cache before these tokens.
        log_probs: Largest log-probabilities of the blocks before these tokens; None: not tracked.
        blocks: All complete blocks, of the cache and of the row.
        block_log_probs: Largest log-probabilities of these blocks; None: not tracked.
        k: Keys of the row.
        v: Values of the row.
        segment_ids: Document ids; 0 is padding.
        positions: Positions within documents.
    """
    docs = index_documents(segment_ids)
    new = update_landmark_cache(cache, blocks, k, v, docs, positions)
    if log_probs is None or block_log_probs is None:
        return new, None
    count = blocks.landmark_time.shape[1]
    source = cache_slot_sources(blocks, docs, positions, cache.partial_k.shape[1], cache.landmark_k.shape[1])[:, None]
    updated = jnp.take_along_axis(block_log_probs, jnp.minimum(source, count - 1), axis=2)
    any_valid = docs.valid.any(axis=1)[:, None, None]
    return new, jnp.where(any_valid, jnp.where(source < count, updated, 0), log_probs)
