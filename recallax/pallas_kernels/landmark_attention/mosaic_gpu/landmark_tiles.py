"""What landmark attention's GPU kernels do with 64 queries against 64 keys, and how tiles come to them.

A tile of keys is 64 tokens of the row, or past blocks side by side: each has 16, 32 or 64 slots, of which the first
`block_size` hold its tokens and the next its landmark, as they follow each other in the row. So one product gives the scores
and the landmarks' logits. Both are taken to base 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.landmark_attention.xla import MASKED_LOGIT
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    Ref,
    block_index,
    broadcast_per_row,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

LOG2E = 1.4426950408889634
NUM_CONSUMER_WGS = 2
"""Warpgroups that compute, each with a tile of its own; the tiles that pass by are the same for both."""
NUM_KEY_STAGES = 4
"""Tiles of keys that are on their way."""
KEY_REGISTERS = 40, 232
"""Where keys pass by: of the warpgroup that copies, and of those that compute; 504 in all."""
NUM_OWN_TILES = NUM_CONSUMER_WGS + 1
"""Tiles that hold the own blocks of neighbouring tiles: these and the one before them."""
TILE_SHAPE = (CHUNK, CHUNK)


class LandmarkKernelConfig(NamedTuple):
    """What the kernels are built for."""

    block_size: int
    padded_block_size: int
    """Of a block."""
    heads_per_group: int
    """Query heads of a key/value head."""
    interpret: bool

    @property
    def blocks_per_tile(self) -> int:
        """Of a tile."""
        return CHUNK // self.padded_block_size


class TileRing(NamedTuple):
    """Tiles on their way: one warpgroup fills the slots, the others free them. Also the types to allocate one."""

    tiles: tuple[Any, ...]
    full_barriers: Any
    empty_barriers: Any

    def slot(self, step: Any) -> Any:
        """That a step's tiles lie in."""
        return lax.rem(step, jnp.int32(self.tiles[0].shape[0]))


def make_tile_ring(num_stages: int, copies_per_slot: int, *tiles: Any) -> TileRing:
    """For `pl.run_scoped`, with that many copies to a slot; the tiles have the stages as their first axis."""
    filled = plgpu.Barrier(num_arrivals=copies_per_slot, num_barriers=num_stages)
    return TileRing(tiles, filled, plgpu.Barrier(num_arrivals=NUM_CONSUMER_WGS, num_barriers=num_stages))


def smem_tiles(num_stages: int, *widths: int) -> list[Any]:
    """Room for so many tiles of each width."""
    return [smem_matrix(num_stages, CHUNK, width, tile=64) for width in widths]


def produce_tiles(ring: TileRing, num_steps: Any, load_tile: Callable[[Any, Any], None]) -> None:
    """The copying warpgroup's part: fetch(step, slot) for each step, when its slot is free."""
    stages = ring.tiles[0].shape[0]

    @pl.loop(0, num_steps)
    def _(step):
        slot = ring.slot(step)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(ring.empty_barriers.at[slot])

        load_tile(step, slot)

    @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)  # a kernel must not end with a barrier's phase unseen
    def _(step):
        plgpu.barrier_wait(ring.empty_barriers.at[ring.slot(step)])


def key_tile_loader(
    ring: TileRing, sources: tuple[Ref, Ref], starts: Ref, first_tile: Any, pair: Any, config: LandmarkKernelConfig
) -> Callable[[Any, Any], None]:
    """For a pair of tiles of queries: the tiles around it, then past blocks from tile `first_tile` on. sources: [P, W]."""

    def fetch(step: Any, slot: Any) -> None:
        targets, arrived = [x.at[slot] for x in ring.tiles], ring.full_barriers.at[slot]

        @pl.when(step < NUM_OWN_TILES)
        def _():
            start = jnp.maximum(pair * NUM_CONSUMER_WGS - 1 + step, 0) * CHUNK
            copy_tile(
                arrived,
                sources,
                targets,
                [start + i * config.padded_block_size for i in range(config.blocks_per_tile)],
                config,
            )

        @pl.when(step >= NUM_OWN_TILES)
        def _():
            copy_block_tile(arrived, sources, targets, starts, first_tile + step - NUM_OWN_TILES, config)

    return fetch


def copy_block_tile(
    barrier: Ref, sources: Any, targets: Any, starts: Ref, tile: Any, config: LandmarkKernelConfig
) -> None:
    """One tile of past blocks."""
    copy_tile(
        barrier,
        sources,
        targets,
        [starts[tile * config.blocks_per_tile + i] for i in range(config.blocks_per_tile)],
        config,
    )


def copy_tile(barrier: Ref, sources: Any, targets: Any, starts: list[Any], config: LandmarkKernelConfig) -> None:
    """A tile from so many places of [P, W]."""
    for i, start in enumerate(starts):
        for source, target in zip(sources, targets, strict=True):
            part = target.at[pl.ds(i * config.padded_block_size, config.padded_block_size)]
            plgpu.copy_gmem_to_smem(source.at[pl.ds(start, config.padded_block_size)], part, barrier)


def consume_key_tiles(
    ring: TileRing, num_past_tiles: Any, own_tile_fn: Callable, past_tile_fn: Callable, carry: Any
) -> Any:
    """The last carry = own(carry, k, v, which of the tiles around) or past(carry, k, v, number of the tile)."""
    worker = lax.axis_index("worker")
    for i in range(NUM_OWN_TILES):
        plgpu.barrier_wait(ring.full_barriers.at[i])
    for i in range(NUM_OWN_TILES - NUM_CONSUMER_WGS + 1):
        carry = own_tile_fn(carry, *(x.at[worker + i] for x in ring.tiles), worker + i)
    plgpu.commit_smem()  # all warps have read
    for i in range(NUM_OWN_TILES):
        plgpu.barrier_arrive(ring.empty_barriers.at[i])

    def turn(tile: Any, carry: Any) -> Any:
        slot = ring.slot(tile + NUM_OWN_TILES)
        plgpu.barrier_wait(ring.full_barriers.at[slot])
        carry = past_tile_fn(carry, *(x.at[slot] for x in ring.tiles), tile)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.empty_barriers.at[slot])
        return carry

    return lax.fori_loop(0, num_past_tiles, turn, carry)


class BlockSoftmax(NamedTuple):
    """A tile of past blocks as its queries see it; vectors along rows are one per block."""

    exponentials: jax.Array
    """Of the scores inside blocks, less the largest of each; 0 at landmarks."""
    sums: list[jax.Array]
    """Their sums."""
    logits: list[jax.Array]
    """Of the landmarks."""


class BlockColumns:
    """Which columns of a tile of past blocks belong together."""

    def __init__(self, config: LandmarkKernelConfig):
        _, columns = row_and_column_iota(TILE_SHAPE)
        self.num_blocks = config.blocks_per_tile
        self.block_of_column = block_index(columns, config.padded_block_size.bit_length() - 1)
        place = columns & (config.padded_block_size - 1)
        self.is_token, self.is_landmark = place < config.block_size, place == config.block_size

    def reduce_blocks(self, x: jax.Array, reduce: Callable, neutral: float) -> list[jax.Array]:
        """Per block, along rows."""
        if self.num_blocks == 1:
            return [reduce(x, axis=1)]
        return [reduce(jnp.where(self.block_of_column == i, x, neutral), axis=1) for i in range(self.num_blocks)]

    def broadcast_blocks(self, vectors: list[jax.Array]) -> jax.Array:
        """The inverse: each block's vector over its columns."""
        *others, out = (broadcast_per_row(x, TILE_SHAPE) for x in vectors)
        for i, x in enumerate(others):
            out = jnp.where(self.block_of_column == i, x, out)
        return out


def tile_scores(*pairs: tuple[Ref, Ref], interpret: bool) -> Any:
    """x y^T of each pair of tiles."""
    products = ((zero_accumulator(*TILE_SHAPE), (x, y.transpose((1, 0)))) for x, y in pairs)
    return wgmma_accumulate(*products, interpret=interpret)


def own_block_scores(scores: jax.Array, tile: Any, own_bounds: Any) -> tuple[jax.Array, jax.Array]:
    """To base 2, and which of a tile's tokens are seen."""
    _, columns = row_and_column_iota(TILE_SHAPE)
    first, last = (broadcast_per_row(x, TILE_SHAPE) for x in own_bounds)
    time = columns + tile * CHUNK
    return scores * LOG2E, (first <= time) & (time <= last)


def block_softmax(scores: jax.Array, columns: BlockColumns) -> BlockSoftmax:
    """The softmax inside each block, not yet divided, and the landmarks' logits."""
    scores = scores * LOG2E
    logits = columns.reduce_blocks(jnp.where(columns.is_landmark, scores, 0.0), jnp.sum, 0.0)
    scores = jnp.where(columns.is_token, scores, MASKED_LOGIT)
    exponentials = jnp.exp2(scores - columns.broadcast_blocks(columns.reduce_blocks(scores, jnp.max, MASKED_LOGIT)))
    return BlockSoftmax(exponentials, columns.reduce_blocks(exponentials, jnp.sum, 0.0), logits)


def visible_block_masks(tile: Any, past_bounds: Any, config: LandmarkKernelConfig) -> list[jax.Array]:
    """Whether each query sees the blocks of a tile."""
    numbers = (tile * config.blocks_per_tile + i for i in range(config.blocks_per_tile))
    return [(past_bounds[0] <= number) & (number < past_bounds[1]) for number in numbers]


def own_block_score_grads(
    scores: jax.Array, weight_grads: jax.Array, tile: Any, own_bounds: Any, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weights, and the scores' slopes; of_values is do.v."""
    scores, seen = own_block_scores(scores, tile, own_bounds)
    weights = jnp.where(seen, jnp.exp2(scores - broadcast_per_row(lse, TILE_SHAPE)), 0.0)
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
    """The same with past blocks; weights are 0 at landmarks."""
    layout = BlockColumns(config)
    part = block_softmax(scores, layout)
    visible = zip(visible_block_masks(tile, past_bounds, config), part.logits, strict=True)
    chosen = [jnp.where(seen, jnp.exp2(logit - lse), 0.0) for seen, logit in visible]
    averages = layout.reduce_blocks(part.exponentials * weight_grads, jnp.sum, 0.0)
    averages = [x / total for x, total in zip(averages, part.sums, strict=True)]
    weights = part.exponentials * layout.broadcast_blocks(
        [p / total for p, total in zip(chosen, part.sums, strict=True)]
    )
    slopes = weights * (weight_grads - layout.broadcast_blocks(averages))
    of_landmarks = [p * (average - delta) for p, average in zip(chosen, averages, strict=True)]
    return weights, jnp.where(layout.is_landmark, layout.broadcast_blocks(of_landmarks), slopes)
