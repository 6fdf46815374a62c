"""Tiles of landmark attention's GPU kernels: how 64 keys are loaded, and what 64 queries compute with them.

A tile of keys is 64 tokens of the row, or past blocks side by side. A past block has 16, 32 or 64 slots: the first
`block_size` hold its tokens and the next its landmark, as they follow each other in the row. One product thus gives the
scores and the landmarks' logits. Both are taken to base 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.landmark_attention.xla import MASKED_LOGIT
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import LOG2E
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA_ROW,
    Ref,
    block_index,
    broadcast_per_row,
    load_vector,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

NUM_CONSUMER_WGS = 2
"""Warpgroups that compute: each owns a tile, and both read the same tiles of the other side."""
NUM_KEY_STAGES = 4
"""Tiles of keys in shared memory at once: the loaded ones and those that are being loaded."""
KEY_REGISTERS = 40, 232
"""Registers per thread of the producer and of each consumer where tiles of keys are loaded: 504 in all, of 512."""
NUM_OWN_TILES = NUM_CONSUMER_WGS + 1
"""Tiles that hold the own blocks of neighbouring tiles of queries: these and the one before them."""
TILE_SHAPE = CHUNK_SHAPE


class LandmarkKernelConfig(NamedTuple):
    """Static configuration of the kernels."""

    block_size: int
    """Tokens of a block, without its landmark."""
    padded_block_size: int
    """Slots of a block in a tile."""
    heads_per_group: int
    """Query heads that share a key/value head."""
    interpret: bool
    """The value of `dispatch.interpreting()` when the op was called."""

    @property
    def blocks_per_tile(self) -> int:
        """Past blocks of a tile."""
        return CHUNK // self.padded_block_size


class TileRing(NamedTuple):
    """A ring of tiles in shared memory: the producer fills the slots, the consumers free them.

    Outside of a kernel its fields are the scratch types.
    """

    tiles: tuple[Any, ...]
    full_barriers: Any
    empty_barriers: Any

    def slot(self, step: Any) -> Any:
        """Return the slot of a step's tiles."""
        return lax.rem(step, jnp.int32(self.tiles[0].shape[0]))


class QueryPass(NamedTuple):
    """Position of a block that owns a pair of tiles of queries, and the keys that they see."""

    row: Any
    head: Any
    pair: Any
    warpgroup: Any
    group: Any
    """Key/value head."""
    first_past_tile: Any
    num_past_tiles: Any

    @classmethod
    def current(cls, key_tile_ranges: Ref, config: LandmarkKernelConfig) -> "QueryPass":
        """Return the position of this block.

        Args:
            key_tile_ranges: Reference to `Visibility.key_tile_ranges`.
            config: Static configuration.
        """
        row, head, pair, warpgroup = (lax.axis_index(name) for name in ("row", "head", "pair", "warpgroup"))
        group = lax.div(head, jnp.int32(config.heads_per_group))
        first = key_tile_ranges[row, pair, 0]
        return cls(row, head, pair, warpgroup, group, first, key_tile_ranges[row, pair, 1] - first)

    def time(self) -> Any:
        """Return the slice of this warpgroup's queries."""
        return pl.ds((self.pair * NUM_CONSUMER_WGS + self.warpgroup) * CHUNK, CHUNK)

    def own_tile(self, offset: Any) -> Any:
        """Return the index of a tile of own tokens; offset 0 is the tile before the pair."""
        return self.pair * NUM_CONSUMER_WGS - 1 + offset


def load_pair(pair: Ref, time: Any) -> list[jax.Array]:
    """Load two vectors of the queries of a warpgroup, such as the bounds of the keys that they see.

    Args:
        pair: Reference [2, P] in global memory.
        time: Slice of the queries.
    """
    return [load_vector(pair.at[i, time], WGMMA_ROW) for i in range(2)]


def make_tile_ring(num_stages: int, copies_per_slot: int, *tiles: Any) -> TileRing:
    """Return the scratch types of a ring for `pl.run_scoped`.

    Args:
        num_stages: Slots.
        copies_per_slot: Copies that fill a slot.
        *tiles: Scratch types whose first axis is the slot.
    """
    full = plgpu.Barrier(num_arrivals=copies_per_slot, num_barriers=num_stages)
    return TileRing(tiles, full, plgpu.Barrier(num_arrivals=NUM_CONSUMER_WGS, num_barriers=num_stages))


def smem_tiles(num_stages: int, *widths: int) -> list[Any]:
    """Return the scratch types of `num_stages` tiles of each width."""
    return [smem_matrix(num_stages, CHUNK, width, tile=64) for width in widths]


def produce_tiles(ring: TileRing, num_steps: Any, load_tile: Callable[[Any, Any], None]) -> None:
    """Fill the ring in the producer warpgroup: call `load_tile(step, slot)` for each step, when its slot is free.

    Args:
        ring: References of the ring.
        num_steps: Number of steps.
        load_tile: Starts the copies of a step, which arrive at the slot's full barrier.
    """
    num_stages = ring.tiles[0].shape[0]

    @pl.loop(0, num_steps)
    def _(step):
        slot = ring.slot(step)

        @pl.when(step >= num_stages)
        def _():
            plgpu.barrier_wait(ring.empty_barriers.at[slot])

        load_tile(step, slot)

    # A kernel must not end before all phases of a barrier are awaited.
    @pl.loop(jnp.maximum(num_steps - num_stages, 0), num_steps)
    def _(step):
        plgpu.barrier_wait(ring.empty_barriers.at[ring.slot(step)])


def produce_key_tiles(
    ring: TileRing, k: Ref, v: Ref, block_starts: Ref, query_pass: QueryPass, config: LandmarkKernelConfig
) -> None:
    """Load, in the producer warpgroup, the keys and values that a pair of tiles of queries sees.

    Args:
        ring: References of the ring.
        k: Reference to the keys [B, P, G, K].
        v: Reference to the values [B, P, G, V].
        block_starts: Reference to `Visibility.block_starts`.
        query_pass: Position of the block.
        config: Static configuration.
    """
    plgpu.set_max_registers(KEY_REGISTERS[0], action="decrease")
    row, pair, group, size = query_pass.row, query_pass.pair, query_pass.group, config.padded_block_size
    sources, starts = (k.at[row, :, group], v.at[row, :, group]), block_starts.at[row]

    def load_tile(step: Any, slot: Any) -> None:
        targets, full = [x.at[slot] for x in ring.tiles], ring.full_barriers.at[slot]

        @pl.when(step < NUM_OWN_TILES)
        def _():
            start = jnp.maximum(pair * NUM_CONSUMER_WGS - 1 + step, 0) * CHUNK
            copy_tile(full, sources, targets, [start + i * size for i in range(config.blocks_per_tile)], config)

        @pl.when(step >= NUM_OWN_TILES)
        def _():
            tile = query_pass.first_past_tile + step - NUM_OWN_TILES
            copy_block_tile(full, sources, targets, starts, tile, config)

    produce_tiles(ring, query_pass.num_past_tiles + NUM_OWN_TILES, load_tile)


def copy_block_tile(
    barrier: Ref, sources: Any, targets: Any, starts: Ref, tile: Any, config: LandmarkKernelConfig
) -> None:
    """Start to copy one tile of past blocks.

    Args:
        barrier: Barrier at which each copy arrives.
        sources: References [P, W] in global memory.
        targets: References [64, W] in shared memory, one per source.
        starts: Reference to the first token of each block.
        tile: Index of the tile.
        config: Static configuration.
    """
    blocks = [starts[tile * config.blocks_per_tile + i] for i in range(config.blocks_per_tile)]
    copy_tile(barrier, sources, targets, blocks, config)


def copy_tile(barrier: Ref, sources: Any, targets: Any, starts: list[Any], config: LandmarkKernelConfig) -> None:
    """Start to copy one tile; arguments as in `copy_block_tile`, with the first token of each block of the tile."""
    size = config.padded_block_size
    for i, start in enumerate(starts):
        for source, target in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(source.at[pl.ds(start, size)], target.at[pl.ds(i * size, size)], barrier)


def consume_key_tiles(
    ring: TileRing, num_past_tiles: Any, own_tile_fn: Callable, past_tile_fn: Callable, carry: Any
) -> Any:
    """Process the tiles of `produce_key_tiles` in a consumer warpgroup and return the last carry.

    Args:
        ring: References of the ring.
        num_past_tiles: Tiles of past blocks.
        own_tile_fn: `own_tile_fn(carry, k, v, offset) -> carry` for the two tiles of own tokens that the queries see.
        past_tile_fn: `past_tile_fn(carry, k, v, tile) -> carry` for each tile of past blocks.
        carry: The first carry.
    """
    warpgroup = lax.axis_index("warpgroup")
    for i in range(NUM_OWN_TILES):
        plgpu.barrier_wait(ring.full_barriers.at[i])
    for i in range(NUM_OWN_TILES - NUM_CONSUMER_WGS + 1):
        carry = own_tile_fn(carry, *(x.at[warpgroup + i] for x in ring.tiles), warpgroup + i)
    plgpu.commit_smem()  # all warps have read
    for i in range(NUM_OWN_TILES):
        plgpu.barrier_arrive(ring.empty_barriers.at[i])

    def add_past_tile(tile: Any, carry: Any) -> Any:
        slot = ring.slot(tile + NUM_OWN_TILES)
        plgpu.barrier_wait(ring.full_barriers.at[slot])
        carry = past_tile_fn(carry, *(x.at[slot] for x in ring.tiles), tile)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.empty_barriers.at[slot])
        return carry

    return lax.fori_loop(0, num_past_tiles, add_past_tile, carry)


class BlockSoftmax(NamedTuple):
    """The softmax inside each block of a tile, not yet divided; vectors along the rows are one per block."""

    exponentials: jax.Array
    """Exponentials of the scores less the largest of each block; 0 at landmarks."""
    sums: list[jax.Array]
    """Sum of the exponentials of each block."""
    logits: list[jax.Array]
    """Logit of each landmark."""


class BlockColumns:
    """The columns of a tile of past blocks, grouped by block."""

    def __init__(self, config: LandmarkKernelConfig):
        _, columns = row_and_column_iota(TILE_SHAPE)
        self.num_blocks = config.blocks_per_tile
        self.block_of_column = block_index(columns, config.padded_block_size.bit_length() - 1)
        slot = columns & (config.padded_block_size - 1)
        self.is_token, self.is_landmark = slot < config.block_size, slot == config.block_size

    def reduce_blocks(self, x: jax.Array, reduce: Callable, neutral: float) -> list[jax.Array]:
        """Reduce the columns of each block to a vector along the rows.

        Args:
            x: Matrix of the tile's shape.
            reduce: `jnp.sum` or `jnp.max`.
            neutral: Neutral element of `reduce`.
        """
        if self.num_blocks == 1:
            return [reduce(x, axis=1)]
        return [reduce(jnp.where(self.block_of_column == i, x, neutral), axis=1) for i in range(self.num_blocks)]

    def broadcast_blocks(self, vectors: list[jax.Array]) -> jax.Array:
        """Repeat each block's vector over its columns."""
        *others, out = (broadcast_per_row(x, TILE_SHAPE) for x in vectors)
        for i, x in enumerate(others):
            out = jnp.where(self.block_of_column == i, x, out)
        return out


def tile_scores(*pairs: tuple[Ref, Ref]) -> Any:
    """Return x y^T of each pair of tiles."""
    return wgmma_accumulate(*((zero_accumulator(*TILE_SHAPE), (x, y.transpose((1, 0)))) for x, y in pairs))


def own_block_scores(scores: jax.Array, tile: Any, own_bounds: Any) -> tuple[jax.Array, jax.Array]:
    """Return scores to base 2, and the mask of visible tokens.

    Args:
        scores: Scores of a tile of tokens, to base e.
        tile: Index of the tile in the row.
        own_bounds: First and last visible token of each query.
    """
    _, columns = row_and_column_iota(TILE_SHAPE)
    first, last = (broadcast_per_row(x, TILE_SHAPE) for x in own_bounds)
    time = columns + tile * CHUNK
    return scores * LOG2E, (first <= time) & (time <= last)


def block_softmax(scores: jax.Array, columns: BlockColumns) -> BlockSoftmax:
    """Compute the softmax inside each block, not yet divided, and the landmarks' logits.

    Args:
        scores: Scores of a tile of past blocks, to base e.
        columns: Columns of the blocks.
    """
    scores = scores * LOG2E
    logits = columns.reduce_blocks(jnp.where(columns.is_landmark, scores, 0.0), jnp.sum, 0.0)
    scores = jnp.where(columns.is_token, scores, MASKED_LOGIT)
    exponentials = jnp.exp2(scores - columns.broadcast_blocks(columns.reduce_blocks(scores, jnp.max, MASKED_LOGIT)))
    return BlockSoftmax(exponentials, columns.reduce_blocks(exponentials, jnp.sum, 0.0), logits)


def visible_block_masks(tile: Any, past_bounds: Any, config: LandmarkKernelConfig) -> list[jax.Array]:
    """Return for each block of a tile which queries see it.

    Args:
        tile: Index of the tile of past blocks.
        past_bounds: First visible block of each query, and one past the last.
        config: Static configuration.
    """
    indices = (tile * config.blocks_per_tile + i for i in range(config.blocks_per_tile))
    return [(past_bounds[0] <= index) & (index < past_bounds[1]) for index in indices]


def own_block_score_grads(
    scores: jax.Array, weight_grads: jax.Array, tile: Any, own_bounds: Any, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of a tile of tokens, and the gradients of its scores.

    Args:
        scores: Scores, to base e.
        weight_grads: do.v of each pair.
        tile: Index of the tile in the row.
        own_bounds: First and last visible token of each query.
        lse: Log2 of the sum of exponentials of each query.
        delta: D = do.o of each query.
    """
    scores, visible = own_block_scores(scores, tile, own_bounds)
    weights = jnp.where(visible, jnp.exp2(scores - broadcast_per_row(lse, TILE_SHAPE)), 0.0)
    return weights, weights * (weight_grads - broadcast_per_row(delta, TILE_SHAPE))


def past_block_score_grads(
    scores: jax.Array,
    weight_grads: jax.Array,
    tile: Any,
    past_bounds: Any,
    lse: jax.Array,
    delta: jax.Array,
    config: LandmarkKernelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of a tile of past blocks, 0 at landmarks, and the gradients of its scores.

    Args:
        scores: Scores, to base e.
        weight_grads: do.v of each pair.
        tile: Index of the tile of past blocks.
        past_bounds: First visible block of each query, and one past the last.
        lse: Log2 of the sum of exponentials of each query.
        delta: D = do.o of each query.
        config: Static configuration.
    """
    columns = BlockColumns(config)
    inner = block_softmax(scores, columns)
    visible = zip(visible_block_masks(tile, past_bounds, config), inner.logits, strict=True)
    block_weights = [jnp.where(mask, jnp.exp2(logit - lse), 0.0) for mask, logit in visible]
    averages = columns.reduce_blocks(inner.exponentials * weight_grads, jnp.sum, 0.0)
    averages = [x / total for x, total in zip(averages, inner.sums, strict=True)]
    factors = [weight / total for weight, total in zip(block_weights, inner.sums, strict=True)]
    weights = inner.exponentials * columns.broadcast_blocks(factors)
    token_grads = weights * (weight_grads - columns.broadcast_blocks(averages))
    landmark_grads = [weight * (average - delta) for weight, average in zip(block_weights, averages, strict=True)]
    return weights, jnp.where(columns.is_landmark, columns.broadcast_blocks(landmark_grads), token_grads)
