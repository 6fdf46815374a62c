"""The blocks of a document as a state: what a row adds to them, and what one token does."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, index_documents, last_valid
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkBlocks, LandmarkCache, complete_blocks
from recallax.types import DType


def init_landmark_cache(
    batch: int, max_len: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: DType
) -> LandmarkCache:
    """For documents of at most `max_len` tokens, landmarks included."""
    count = max(1, max_len // (block_size + 1))
    marks = jnp.zeros((batch, count, num_kv_heads, head_dim), dtype)
    block, own = (jnp.zeros((*lead, block_size, num_kv_heads, head_dim), dtype) for lead in ((batch, count), (batch,)))
    return LandmarkCache(marks, block, block, own, own)


def cache_slot_sources(
    blocks: LandmarkBlocks, document_ids: DocumentIds, positions: Int[Array, "B T"], block_size: int, num_slots: int
) -> Int[Array, "B N"]:
    """Which of the blocks stands in each slot of the cache after the row, whose last document it holds; their number
    where there is none. The first `num_slots` of the blocks are the cache's own."""
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
    """The cache after T further tokens, given all complete blocks; rows without any token keep theirs. Slots that hold
    nothing are zero."""
    slots, real = cache.k.shape[1:3]
    source = cache_slot_sources(blocks, document_ids, positions, real, slots)
    nothing = ~document_ids.valid.any(axis=1)

    def taken(old: Array, x: Array) -> Array:
        rank = [1] * (x.ndim - 2)
        at = jnp.minimum(source, x.shape[1] - 1).reshape(*source.shape, *rank)
        found = (source < x.shape[1]).reshape(*source.shape, *rank)
        new = jnp.where(found, jnp.take_along_axis(x, at, axis=1), 0).astype(old.dtype)
        return jnp.where(nothing.reshape(-1, *[1] * (x.ndim - 1)), old, new)

    last = jnp.maximum(last_valid(document_ids), 0)[:, None]
    ended = jnp.take_along_axis(positions, last, axis=1) % (real + 1)
    place = jnp.arange(real)[None]
    time = last - ended + place
    begun = (place <= ended) & (ended < real)

    def unfinished(old: Array, x: Array) -> Array:
        new = jnp.take_along_axis(x, jnp.maximum(time, 0)[..., None, None], axis=1).astype(old.dtype)
        new = jnp.where((time >= 0)[..., None, None], new, old)
        new = jnp.where(begun[..., None, None], new, 0)
        return jnp.where(nothing[:, None, None, None], old, new)

    marks, keys, values = (taken(old, x) for old, x in zip(cache[:3], blocks[:3], strict=True))
    return LandmarkCache(marks, keys, values, unfinished(cache.partial_k, k), unfinished(cache.partial_v, v))


def append_to_partial_block(
    cache: LandmarkCache,
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> LandmarkCache:
    """With one further token of each active row in its unfinished block; a landmark changes nothing."""
    real = cache.partial_k.shape[1]
    place = position % (real + 1)
    here = (jnp.arange(real)[None] == place[:, None]) & active[:, None]
    afresh = (active & (place == 0))[:, None, None, None]

    def written(own: Array, new: Array) -> Array:
        own = jnp.where(afresh, 0, own)
        return jnp.where(here[..., None, None], new[:, None].astype(own.dtype), own)

    return cache._replace(partial_k=written(cache.partial_k, k), partial_v=written(cache.partial_v, v))


def close_partial_block(
    cache: LandmarkCache, k: Float[Array, "B G K"], position: Int[Array, " B"], active: Bool[Array, " B"]
) -> LandmarkCache:
    """With the unfinished block of each active row behind the others, where this token is its landmark."""
    slots, real = cache.k.shape[1:3]
    done = active & (position % (real + 1) == real)
    at = jnp.where(done, position // (real + 1), slots)  # out of range where nothing is to be written
    row = jnp.arange(position.shape[0])

    def placed(blocks: Array, block: Array) -> Array:
        return blocks.at[row, at].set(block.astype(blocks.dtype), mode="drop")

    def cleared(own: Array) -> Array:
        return jnp.where(done[:, None, None, None], 0, own)

    keys, values = placed(cache.k, cache.partial_k), placed(cache.v, cache.partial_v)
    return LandmarkCache(placed(cache.landmark_k, k), keys, values, cleared(cache.partial_k), cleared(cache.partial_v))


def cached_and_new_blocks(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: LandmarkCache,
) -> LandmarkBlocks:
    """The cache's blocks and those that end in the row, with keys as the cache holds them."""
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
    """The cache after T further tokens, and what is known of each of its blocks; `log_probs` is what was before."""
    docs = index_documents(segment_ids)
    new = update_landmark_cache(cache, blocks, k, v, docs, positions)
    if log_probs is None or block_log_probs is None:
        return new, None
    count = blocks.landmark_time.shape[1]
    source = cache_slot_sources(blocks, docs, positions, cache.partial_k.shape[1], cache.landmark_k.shape[1])[:, None]
    taken = jnp.take_along_axis(block_log_probs, jnp.minimum(source, count - 1), axis=2)
    some = docs.valid.any(axis=1)[:, None, None]
    return new, jnp.where(some, jnp.where(source < count, taken, 0), log_probs)
