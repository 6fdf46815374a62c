"""The complete blocks of a row, gathered out of its documents, and what a block is.

A document is cut into blocks of `block_size` tokens and a landmark: position p is the landmark of block p // (real + 1) where
p % (real + 1) = real. Documents may begin anywhere in a row.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.gather_with_inverse import gather_with_inverse


class LandmarkCache(NamedTuple):
    """The blocks of a document so far. Keys carry no position but their place in the block, so that a block can be
    read wherever it is put; a landmark has no value, since it is never read."""

    landmark_k: Float[Array, "B N G K"]
    """Keys of the complete blocks' landmarks, which choose the blocks."""
    k: Float[Array, "B N L G K"]
    v: Float[Array, "B N L G V"]
    partial_k: Float[Array, "B L G K"]
    """The unfinished block."""
    partial_v: Float[Array, "B L G V"]


class LandmarkBlocks(NamedTuple):
    """Complete blocks in the order of time, those of a cache first."""

    landmark_k: Float[Array, "B M G K"]
    k: Float[Array, "B M L G K"]
    v: Float[Array, "B M L G V"]
    document_index: Int[Array, "B M"]
    """Index in the row."""
    block_index: Int[Array, "B M"]
    """In its document."""
    landmark_time: Int[Array, "B M"]
    """Of the landmark in the row: -1 before the row, the row's length where there is no block."""


def complete_blocks(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> LandmarkBlocks:
    """The blocks whose landmark stands in the row, and those of the cache (its first ones; `positions[:, 0]` counts
    what it has seen), which belong to the row's first document."""
    rows, length = positions.shape
    size = block_size + 1
    count = max(1, (length + (0 if cache is None else block_size)) // size)
    time = jnp.arange(length)[None]
    ends = document_ids.valid & (positions % size == block_size)
    rank = jnp.cumsum(ends, axis=1) - 1
    landmark = jnp.sort(jnp.where(ends, time, length), axis=1)[:, :count]
    held = landmark < length
    last = jnp.minimum(landmark, length - 1)

    place = positions % size
    finish = jnp.minimum(time + block_size - place, length - 1)  # where its landmark would stand
    whole = document_ids.valid & (place < block_size) & (time + block_size - place < length)
    whole &= jnp.take_along_axis(ends, finish, axis=1)
    target = jnp.where(whole, jnp.take_along_axis(rank, finish, axis=1) * block_size + place, count * block_size)
    source = landmark[:, :, None] - block_size + jnp.arange(block_size)[None, None]
    begun = source < 0  # before the row: in the cache's unfinished block
    source = jnp.where(held[..., None] & ~begun, source, length).reshape(rows, -1)

    def gathered(x: Array, own: Array | None) -> Array:
        """[B, M, L, G, W]"""
        taken = gather_with_inverse(x, source, target).reshape(rows, count, block_size, *x.shape[2:])
        if own is None:
            return taken
        return jnp.where((begun & held[..., None])[..., None, None], own[:, None].astype(x.dtype), taken)

    def at(x: Array) -> Array:
        return jnp.take_along_axis(x, last, axis=1)

    marks = gather_with_inverse(k, landmark, jnp.where(ends, rank, count))
    number = jnp.where(held, at(positions) // size, 0)
    new = LandmarkBlocks(
        marks,
        gathered(k, None if cache is None else cache.partial_k),
        gathered(v, None if cache is None else cache.partial_v),
        at(document_ids.index),
        number,
        landmark,
    )
    return new if cache is None else _concat_cached_blocks(cache, new, positions, size, length)


def _concat_cached_blocks(
    cache: LandmarkCache, new: LandmarkBlocks, positions: Int[Array, "B T"], size: int, length: int
) -> LandmarkBlocks:
    """The cache's blocks, then the new ones; an empty slot may hold anything, NaN included."""
    number = jnp.broadcast_to(jnp.arange(cache.landmark_k.shape[1])[None], cache.landmark_k.shape[:2])
    filled = number < positions[:, :1] // size
    marks, k, v = (jnp.where(filled.reshape(*filled.shape, *[1] * (x.ndim - 2)), x, 0) for x in cache[:3])
    old = LandmarkBlocks(marks, k, v, jnp.zeros_like(number), number, jnp.where(filled, -1, length))
    joined = (jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip(old, new, strict=True))
    return LandmarkBlocks(*joined)


def visible_blocks(blocks: LandmarkBlocks, document: Int[Array, "B C"], time: Int[Array, " C"]) -> Bool[Array, "B C M"]:
    """Whether tokens at these times of a row see a block: it is of their document and complete before them."""
    return (blocks.document_index[:, None] == document[:, :, None]) & (
        blocks.landmark_time[:, None] < time[None, :, None]
    )


class LocalKV(NamedTuple):
    """What tokens see token by token: their own block. Slot `real + t` holds the row's token t, so that the slots in
    front hold what a cache's unfinished block has of the tokens before the row."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    block_start: Int[Array, "B S"]
    """When the token's block began, in the row's time, which tells its blocks apart; below every query's where nobody
    sees the slot."""


def local_kv(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> LocalKV:
    """The tokens that can be seen one by one: all but landmarks and padding."""
    size = block_size + 1
    place, time = positions % size, jnp.arange(positions.shape[1])[None]
    begin = jnp.where(document_ids.valid & (place < block_size), time - place, -size)
    if cache is None:
        pad = ((0, 0), (block_size, 0))
        keys, values = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (k, v))
        return LocalKV(keys, values, jnp.pad(begin, pad, constant_values=-size))
    source = jnp.arange(block_size)[None] - block_size + place[:, :1]  # so that the newest stands right before the row
    held = source >= 0
    at = jnp.maximum(source, 0)[..., None, None]

    def behind(own: Array, x: Array) -> Array:
        before = jnp.where(held[..., None, None], jnp.take_along_axis(own, at, axis=1), 0)
        return jnp.concatenate([before.astype(x.dtype), x], axis=1)

    before = jnp.where(held, -place[:, :1], -size)
    return LocalKV(behind(cache.partial_k, k), behind(cache.partial_v, v), jnp.concatenate([before, begin], axis=1))
