"""Blocks of landmark attention: the cache, and the complete blocks and local keys of a row.

A document is split into blocks of `block_size` tokens and a landmark: position p is the landmark of block
p // (block_size + 1) if p mod (block_size + 1) equals block_size. Documents may start anywhere in a row.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.gather_with_inverse import gather_with_inverse


class LandmarkCache(NamedTuple):
    """Blocks of a document so far: N slots of complete blocks of L tokens, and the incomplete block.

    Keys are rotated by their offset in the block only, so that a block can be read at any distance. Landmarks have no
    values, because values of landmarks are never read.
    """

    landmark_k: Float[Array, "B N G K"]
    """Keys of the landmarks of the complete blocks, which select the blocks."""
    k: Float[Array, "B N L G K"]
    v: Float[Array, "B N L G V"]
    partial_k: Float[Array, "B L G K"]
    """Keys of the incomplete block."""
    partial_v: Float[Array, "B L G V"]
    """Values of the incomplete block."""


class LandmarkBlocks(NamedTuple):
    """M complete blocks in temporal order, those of a cache first."""

    landmark_k: Float[Array, "B M G K"]
    k: Float[Array, "B M L G K"]
    v: Float[Array, "B M L G V"]
    document_index: Int[Array, "B M"]
    """Index of the document in the row."""
    block_index: Int[Array, "B M"]
    """Index of the block in its document."""
    landmark_time: Int[Array, "B M"]
    """Index of the landmark in the row; -1 for cached blocks, the row's length if there is no block."""


def complete_blocks(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> LandmarkBlocks:
    """Return the blocks of the cache and those whose landmark is in the row.

    Args:
        k: Keys of the row.
        v: Values of the row.
        document_ids: Documents of the row.
        positions: Positions within documents; the first position of a row is the number of tokens in its cache.
        block_size: Tokens of a block besides its landmark.
        cache: Blocks of the row's first document before the row; None: no tokens.
    """
    rows, length = positions.shape
    size = block_size + 1
    count = max(1, (length + (0 if cache is None else block_size)) // size)
    time = jnp.arange(length)[None]
    ends = document_ids.valid & (positions % size == block_size)
    rank = jnp.cumsum(ends, axis=1) - 1
    landmark = jnp.sort(jnp.where(ends, time, length), axis=1)[:, :count]
    exists = landmark < length
    last = jnp.minimum(landmark, length - 1)

    offset = positions % size
    token_landmark = jnp.minimum(time + block_size - offset, length - 1)  # index of the landmark of each token
    complete = document_ids.valid & (offset < block_size) & (time + block_size - offset < length)
    complete &= jnp.take_along_axis(ends, token_landmark, axis=1)
    token_rank = jnp.take_along_axis(rank, token_landmark, axis=1)
    target = jnp.where(complete, token_rank * block_size + offset, count * block_size)
    source = landmark[:, :, None] - block_size + jnp.arange(block_size)[None, None]
    in_cache = source < 0  # tokens before the row, in the incomplete block of the cache
    source = jnp.where(exists[..., None] & ~in_cache, source, length).reshape(rows, -1)

    def gather_complete(x: Array, partial: Array | None) -> Array:
        """Gather the tokens of each block, [B, M, L, G, W]."""
        tokens = gather_with_inverse(x, source, target).reshape(rows, count, block_size, *x.shape[2:])
        if partial is None:
            return tokens
        return jnp.where((in_cache & exists[..., None])[..., None, None], partial[:, None].astype(x.dtype), tokens)

    def at_landmark(x: Array) -> Array:
        return jnp.take_along_axis(x, last, axis=1)

    landmark_k = gather_with_inverse(k, landmark, jnp.where(ends, rank, count))
    block_index = jnp.where(exists, at_landmark(positions) // size, 0)
    new = LandmarkBlocks(
        landmark_k,
        gather_complete(k, None if cache is None else cache.partial_k),
        gather_complete(v, None if cache is None else cache.partial_v),
        at_landmark(document_ids.index),
        block_index,
        landmark,
    )
    return new if cache is None else _concat_cached_blocks(cache, new, positions, size, length)


def _concat_cached_blocks(
    cache: LandmarkCache, new: LandmarkBlocks, positions: Int[Array, "B T"], size: int, length: int
) -> LandmarkBlocks:
    """Concatenate the blocks of the cache and the new ones; empty slots of the cache may contain NaN."""
    block_index = jnp.broadcast_to(jnp.arange(cache.landmark_k.shape[1])[None], cache.landmark_k.shape[:2])
    filled = block_index < positions[:, :1] // size
    landmark_k, k, v = (jnp.where(filled.reshape(*filled.shape, *[1] * (x.ndim - 2)), x, 0) for x in cache[:3])
    old = LandmarkBlocks(landmark_k, k, v, jnp.zeros_like(block_index), block_index, jnp.where(filled, -1, length))
    joined = (jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip(old, new, strict=True))
    return LandmarkBlocks(*joined)


def visible_blocks(blocks: LandmarkBlocks, document: Int[Array, "B C"], time: Int[Array, " C"]) -> Bool[Array, "B C M"]:
    """Return True where a query sees a block: same document, and the landmark precedes the query.

    Args:
        blocks: The blocks.
        document: Document index of each query.
        time: Index of each query in the row.
    """
    return (blocks.document_index[:, None] == document[:, :, None]) & (
        blocks.landmark_time[:, None] < time[None, :, None]
    )


class LocalKV(NamedTuple):
    """Keys and values of the queries' own blocks, S = block_size + T slots.

    Slot block_size + t stores token t of the row. The first block_size slots store the tokens of the cache's incomplete
    block.
    """

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    block_start: Int[Array, "B S"]
    """Index in the row at which the token's block starts, which identifies the block; a slot that no query sees has a
    lower value than all queries."""


def local_kv(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> LocalKV:
    """Return the slots of a row; landmarks and padding are not visible.

    Args:
        k: Keys of the row.
        v: Values of the row.
        document_ids: Documents of the row.
        positions: Positions within documents.
        block_size: Tokens of a block besides its landmark.
        cache: Blocks of the row's first document before the row; None: no tokens.
    """
    size = block_size + 1
    offset, time = positions % size, jnp.arange(positions.shape[1])[None]
    block_start = jnp.where(document_ids.valid & (offset < block_size), time - offset, -size)
    if cache is None:
        pad = ((0, 0), (block_size, 0))
        keys, values = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (k, v))
        return LocalKV(keys, values, jnp.pad(block_start, pad, constant_values=-size))
    source = jnp.arange(block_size)[None] - block_size + offset[:, :1]  # the newest token comes last
    in_block = source >= 0
    index = jnp.maximum(source, 0)[..., None, None]

    def prepend(partial: Array, x: Array) -> Array:
        cached = jnp.where(in_block[..., None, None], jnp.take_along_axis(partial, index, axis=1), 0)
        return jnp.concatenate([cached.astype(x.dtype), x], axis=1)

    block_start = jnp.concatenate([jnp.where(in_block, -offset[:, :1], -size), block_start], axis=1)
    return LocalKV(prepend(cache.partial_k, k), prepend(cache.partial_v, v), block_start)
