"""What the queries of landmark attention's GPU kernels see, as bounds: documents, padding and causality in one.

A query's own block is a stretch of the row, and the past blocks that it sees are neighbours in the order of time. So
four numbers per query are all the masks there are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from recallax.pallas_kernels.landmark_attention.mosaic_gpu_tiles import WORKERS, Sizes
from recallax.pallas_kernels.landmark_attention.xla import documents_of
from recallax.pallas_kernels.mosaic_gpu import CHUNK


class Where(NamedTuple):
    """What queries see, P being a multiple of two tiles. Pairs [first, last)."""

    own: Int[Array, "B 2 P"]
    """The first and the last token of the own block that each query sees, by its time in the row."""
    past: Int[Array, "B 2 P"]
    """The first block, by its number in the row, and the one behind the last."""
    starts: Int[Array, "B M"]
    """When each block begins. They fill whole tiles; those that do not exist begin anywhere."""
    tiles_of_queries: Int[Array, "B N 2"]
    """The tiles of past blocks that two tiles of queries see."""
    queries_of_tiles: Int[Array, "B L 2"]
    """The tiles of queries that see two tiles of past blocks."""
    slot: Int[Array, "B P"]
    """Of each token among those of the past blocks; behind all of them if its block is not complete."""


def where(segments: Int[Array, "B T"] | None, positions: Int[Array, "B T"], sizes: Sizes, padded: int) -> Where:
    """For rows that are padded to P tokens, which see nothing."""
    docs, positions, (_, length) = documents_of(segments, positions), positions.astype(jnp.int32), positions.shape
    size, time = sizes.real + 1, jnp.arange(length, dtype=jnp.int32)[None]
    per_pair = WORKERS * sizes.blocks
    count = -(-max(1, length // size) // per_pair) * per_pair
    place = positions % size
    landmark = docs.valid & (place == sizes.real)
    marks = landmark.astype(jnp.int32)
    complete = jnp.minimum(jnp.cumsum(marks, axis=1) - marks, count)  # before a token
    first = lax.cummax(jnp.where(jnp.diff(docs.index, axis=1, prepend=-1) > 0, complete, 0), axis=1)

    ends = jnp.sort(jnp.where(landmark, time, length), axis=1)[:, :count]
    ends = jnp.pad(ends, ((0, 0), (0, count - ends.shape[1])), constant_values=length)
    end = jnp.take_along_axis(ends, jnp.minimum(complete, count - 1), axis=1)  # of a token's block, if it has one
    whole = docs.valid & (complete < count) & (end < length) & (end - time == sizes.real - place)

    def filled(x: Int[Array, "B T"], value: int) -> Int[Array, "B P"]:
        return jnp.pad(x, ((0, 0), (0, padded - length)), constant_values=value)

    own = filled(jnp.maximum(time - place, 0), 0), filled(jnp.where(docs.valid, time - marks, -1), -1)
    past = filled(first, 0), filled(jnp.where(docs.valid, complete, 0), 0)
    low, high = (x[:, None] for x in _tiles(*past, CHUNK, sizes, count))
    mine = WORKERS * jnp.arange(count // per_pair, dtype=jnp.int32)[None, :, None]
    sees = (low < mine + WORKERS) & (high > mine)
    tiles = jnp.arange(sees.shape[2], dtype=jnp.int32)[None, None]
    queries = jnp.where(sees, tiles, tiles.size).min(axis=2), jnp.where(sees, tiles + 1, 0).max(axis=2)
    return Where(
        jnp.stack(own, axis=1),
        jnp.stack(past, axis=1),
        jnp.clip(ends - sizes.real, 0, padded - sizes.slots),
        jnp.stack(_tiles(*past, WORKERS * CHUNK, sizes, count), axis=2),
        jnp.stack([jnp.minimum(*queries), queries[1]], axis=2),
        filled(jnp.where(whole, complete * sizes.slots + place, count * sizes.slots), count * sizes.slots),
    )


def _tiles(
    low: Int[Array, "B P"], high: Int[Array, "B P"], queries: int, sizes: Sizes, count: int
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Of blocks, that so many neighbouring queries see: the first, and the one behind the last."""
    low, high = (x.reshape(x.shape[0], -1, queries) for x in (low, high))
    first = jnp.where(low < high, low, count).min(axis=2) // sizes.blocks
    return first, jnp.maximum(first, -(-high.max(axis=2) // sizes.blocks))
