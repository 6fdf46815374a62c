"""What the queries of landmark attention's GPU kernels see, as bounds: documents, padding and causality in one.

A query's own block is a stretch of the row, and the past blocks that it sees are neighbours in the order of time. So
four numbers per query are all the masks there are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_tiles import NUM_CONSUMER_WGS, LandmarkKernelConfig
from recallax.pallas_kernels.landmark_attention.xla import documents_or_single
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK


class Visibility(NamedTuple):
    """What queries see, P being a multiple of two tiles. Pairs [first, last)."""

    own_bounds: Int[Array, "B 2 P"]
    """The first and the last token of the own block that each query sees, by its time in the row."""
    past_bounds: Int[Array, "B 2 P"]
    """The first block, by its number in the row, and the one behind the last."""
    block_starts: Int[Array, "B M"]
    """When each block begins. They fill whole tiles; those that do not exist begin anywhere."""
    key_tile_ranges: Int[Array, "B N 2"]
    """The tiles of past blocks that two tiles of queries see."""
    query_tile_ranges: Int[Array, "B L 2"]
    """The tiles of queries that see two tiles of past blocks."""
    token_slot: Int[Array, "B P"]
    """Of each token among those of the past blocks; behind all of them if its block is not complete."""


def compute_visibility(
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    config: LandmarkKernelConfig,
    padded_length: int,
) -> Visibility:
    """For rows that are padded to P tokens, which see nothing."""
    docs, positions, (_, length) = (
        documents_or_single(segment_ids, positions),
        positions.astype(jnp.int32),
        positions.shape,
    )
    size, time = config.block_size + 1, jnp.arange(length, dtype=jnp.int32)[None]
    per_pair = NUM_CONSUMER_WGS * config.blocks_per_tile
    count = -(-max(1, length // size) // per_pair) * per_pair
    place = positions % size
    landmark = docs.valid & (place == config.block_size)
    marks = landmark.astype(jnp.int32)
    complete = jnp.minimum(jnp.cumsum(marks, axis=1) - marks, count)  # before a token
    first = lax.cummax(jnp.where(jnp.diff(docs.index, axis=1, prepend=-1) > 0, complete, 0), axis=1)

    ends = jnp.sort(jnp.where(landmark, time, length), axis=1)[:, :count]
    ends = jnp.pad(ends, ((0, 0), (0, count - ends.shape[1])), constant_values=length)
    end = jnp.take_along_axis(ends, jnp.minimum(complete, count - 1), axis=1)  # of a token's block, if it has one
    whole = docs.valid & (complete < count) & (end < length) & (end - time == config.block_size - place)

    def filled(x: Int[Array, "B T"], value: int) -> Int[Array, "B P"]:
        return jnp.pad(x, ((0, 0), (0, padded_length - length)), constant_values=value)

    own = filled(jnp.maximum(time - place, 0), 0), filled(jnp.where(docs.valid, time - marks, -1), -1)
    past = filled(first, 0), filled(jnp.where(docs.valid, complete, 0), 0)
    low, high = (x[:, None] for x in _tile_bounds(*past, CHUNK, config, count))
    mine = NUM_CONSUMER_WGS * jnp.arange(count // per_pair, dtype=jnp.int32)[None, :, None]
    sees = (low < mine + NUM_CONSUMER_WGS) & (high > mine)
    tiles = jnp.arange(sees.shape[2], dtype=jnp.int32)[None, None]
    queries = jnp.where(sees, tiles, tiles.size).min(axis=2), jnp.where(sees, tiles + 1, 0).max(axis=2)
    return Visibility(
        jnp.stack(own, axis=1),
        jnp.stack(past, axis=1),
        jnp.clip(ends - config.block_size, 0, padded_length - config.padded_block_size),
        jnp.stack(_tile_bounds(*past, NUM_CONSUMER_WGS * CHUNK, config, count), axis=2),
        jnp.stack([jnp.minimum(*queries), queries[1]], axis=2),
        filled(
            jnp.where(whole, complete * config.padded_block_size + place, count * config.padded_block_size),
            count * config.padded_block_size,
        ),
    )


def _tile_bounds(
    low: Int[Array, "B P"], high: Int[Array, "B P"], queries: int, config: LandmarkKernelConfig, count: int
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Of blocks, that so many neighbouring queries see: the first, and the one behind the last."""
    low, high = (x.reshape(x.shape[0], -1, queries) for x in (low, high))
    first = jnp.where(low < high, low, count).min(axis=2) // config.blocks_per_tile
    return first, jnp.maximum(first, -(-high.max(axis=2) // config.blocks_per_tile))
