"""Bounds of the keys that each query of landmark attention sees: documents, padding and causality in one.

The own block of a query is an interval of the row, and the past blocks that it sees are contiguous in the order of
time. Four numbers per query are therefore the only masks.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_tiles import NUM_CONSUMER_WGS, LandmarkKernelConfig
from recallax.pallas_kernels.landmark_attention.xla import documents_or_single
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK


class Visibility(NamedTuple):
    """Bounds of visible keys. P is a multiple of two tiles; ranges are [first, last)."""

    own_bounds: Int[Array, "B 2 P"]
    """First and last token of the own block that each query sees, as times in the row."""
    past_bounds: Int[Array, "B 2 P"]
    """First past block that each query sees, and one past the last, as indices in the row."""
    block_starts: Int[Array, "B M"]
    """First token of each block. The blocks fill whole tiles; those that do not exist start anywhere."""
    key_tile_ranges: Int[Array, "B N 2"]
    """Tiles of past blocks that each pair of tiles of queries sees."""
    query_tile_ranges: Int[Array, "B L 2"]
    """Tiles of queries that see each pair of tiles of past blocks."""
    token_slot: Int[Array, "B P"]
    """Slot of each token among those of the past blocks; after all of them if its block is not complete."""


class _BlockCounts(NamedTuple):
    """Blocks of each row, from its landmarks."""

    is_landmark: Bool[Array, "B T"]
    num_complete: Int[Array, "B T"]
    """Blocks of the row that are complete before each token."""
    first_of_document: Int[Array, "B T"]
    """Blocks of the row that are complete before the token's document."""
    ends: Int[Array, "B M"]
    """Landmark of each block; the length of the row for those that do not exist."""


def compute_visibility(
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    config: LandmarkKernelConfig,
    padded_length: int,
) -> Visibility:
    """Compute the bounds of rows that are padded to P tokens. Padding sees nothing.

    Args:
        segment_ids: Document ids; 0 is padding. None: one document per row.
        positions: Positions within the document.
        config: Static configuration.
        padded_length: P.
    """
    documents, positions = documents_or_single(segment_ids, positions), positions.astype(jnp.int32)
    length = positions.shape[1]
    size, time = config.block_size + 1, jnp.arange(length, dtype=jnp.int32)[None]
    blocks_per_pair = NUM_CONSUMER_WGS * config.blocks_per_tile
    max_blocks = -(-max(1, length // size) // blocks_per_pair) * blocks_per_pair
    place = positions % size
    counts = _count_blocks(documents, place, config.block_size, max_blocks)

    def pad(x: Int[Array, "B T"], value: int) -> Int[Array, "B P"]:
        return jnp.pad(x, ((0, 0), (0, padded_length - length)), constant_values=value)

    own = (
        pad(jnp.maximum(time - place, 0), 0),
        pad(jnp.where(documents.valid, time - counts.is_landmark.astype(jnp.int32), -1), -1),
    )
    past = pad(counts.first_of_document, 0), pad(jnp.where(documents.valid, counts.num_complete, 0), 0)
    # The landmark of a token's own block, if the row has it.
    end = jnp.take_along_axis(counts.ends, jnp.minimum(counts.num_complete, max_blocks - 1), axis=1)
    is_complete = documents.valid & (counts.num_complete < max_blocks) & (end < length)
    is_complete &= end - time == config.block_size - place
    num_slots = max_blocks * config.padded_block_size
    token_slot = jnp.where(is_complete, counts.num_complete * config.padded_block_size + place, num_slots)
    return Visibility(
        jnp.stack(own, axis=1),
        jnp.stack(past, axis=1),
        jnp.clip(counts.ends - config.block_size, 0, padded_length - config.padded_block_size),
        jnp.stack(_tile_bounds(*past, NUM_CONSUMER_WGS * CHUNK, config, max_blocks), axis=2),
        _query_tile_ranges(*past, config, max_blocks),
        pad(token_slot, num_slots),
    )


def _count_blocks(documents: DocumentIds, place: Int[Array, "B T"], block_size: int, max_blocks: int) -> _BlockCounts:
    """Count complete blocks. `place` is the place of each token in its block."""
    length = place.shape[1]
    time = jnp.arange(length, dtype=jnp.int32)[None]
    is_landmark = documents.valid & (place == block_size)
    marks = is_landmark.astype(jnp.int32)
    num_complete = jnp.minimum(jnp.cumsum(marks, axis=1) - marks, max_blocks)
    document_starts = jnp.diff(documents.index, axis=1, prepend=-1) > 0
    first_of_document = lax.cummax(jnp.where(document_starts, num_complete, 0), axis=1)
    ends = jnp.sort(jnp.where(is_landmark, time, length), axis=1)[:, :max_blocks]
    ends = jnp.pad(ends, ((0, 0), (0, max_blocks - ends.shape[1])), constant_values=length)
    return _BlockCounts(is_landmark, num_complete, first_of_document, ends)


def _query_tile_ranges(
    low: Int[Array, "B P"], high: Int[Array, "B P"], config: LandmarkKernelConfig, max_blocks: int
) -> Int[Array, "B L 2"]:
    """Return the tiles of queries that see each pair of tiles of past blocks, as [first, last)."""
    low, high = (x[:, None] for x in _tile_bounds(low, high, CHUNK, config, max_blocks))
    num_pairs = max_blocks // (NUM_CONSUMER_WGS * config.blocks_per_tile)
    first_tile = NUM_CONSUMER_WGS * jnp.arange(num_pairs, dtype=jnp.int32)[None, :, None]
    sees = (low < first_tile + NUM_CONSUMER_WGS) & (high > first_tile)
    tiles = jnp.arange(sees.shape[2], dtype=jnp.int32)[None, None]
    first, last = jnp.where(sees, tiles, tiles.size).min(axis=2), jnp.where(sees, tiles + 1, 0).max(axis=2)
    return jnp.stack([jnp.minimum(first, last), last], axis=2)


def _tile_bounds(
    low: Int[Array, "B P"], high: Int[Array, "B P"], num_queries: int, config: LandmarkKernelConfig, max_blocks: int
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Return the first tile of past blocks that each group of consecutive queries sees, and one past the last."""
    low, high = (x.reshape(x.shape[0], -1, num_queries) for x in (low, high))
    first = jnp.where(low < high, low, max_blocks).min(axis=2) // config.blocks_per_tile
    return first, jnp.maximum(first, -(-high.max(axis=2) // config.blocks_per_tile))
