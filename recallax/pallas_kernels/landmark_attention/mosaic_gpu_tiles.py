"""What landmark attention's GPU kernels do with 64 queries against 64 keys, and how tiles come to them.

A tile of keys is 64 tokens of the row, or past blocks side by side: each has 16, 32 or 64 slots, of which the first
`real` hold its tokens and the next its landmark, as they follow each other in the row. So one product gives the scores
and the landmarks' logits. Both are taken to base 2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.landmark_attention.xla import NEVER
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    Ref,
    accumulate,
    along_rows,
    block_of,
    matrix,
    rows_and_columns,
    zeros,
)

LOG2E = 1.4426950408889634
WORKERS = 2
"""Warpgroups that compute, each with a tile of its own; the tiles that pass by are the same for both."""
STAGES = 4
"""Tiles of keys that are on their way."""
KEY_REGISTERS = 40, 232
"""Where keys pass by: of the warpgroup that copies, and of those that compute; 504 in all."""
AROUND = WORKERS + 1
"""Tiles that hold the own blocks of neighbouring tiles: these and the one before them."""
SHAPE = (CHUNK, CHUNK)


class Sizes(NamedTuple):
    """What the kernels are built for."""

    real: int
    slots: int
    """Of a block."""
    share: int
    """Query heads of a key/value head."""
    interpret: bool

    @property
    def blocks(self) -> int:
        """Of a tile."""
        return CHUNK // self.slots


class Ring(NamedTuple):
    """Tiles on their way: one warpgroup fills the slots, the others free them. Also the types to allocate one."""

    tiles: tuple[Any, ...]
    filled: Any
    freed: Any

    def slot(self, step: Any) -> Any:
        """That a step's tiles lie in."""
        return lax.rem(step, jnp.int32(self.tiles[0].shape[0]))


def ring(stages: int, copies: int, *tiles: Any) -> Ring:
    """For `pl.run_scoped`, with that many copies to a slot; the tiles have the stages as their first axis."""
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return Ring(tiles, filled, plgpu.Barrier(num_arrivals=WORKERS, num_barriers=stages))


def tiles_of(stages: int, *widths: int) -> list[Any]:
    """Room for so many tiles of each width."""
    return [matrix(stages, CHUNK, width, tile=64) for width in widths]


def fill(ring: Ring, count: Any, fetch: Callable[[Any, Any], None]) -> None:
    """The copying warpgroup's part: fetch(step, slot) for each step, when its slot is free."""
    stages = ring.tiles[0].shape[0]

    @pl.loop(0, count)
    def _(step):
        slot = ring.slot(step)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(ring.freed.at[slot])

        fetch(step, slot)

    @pl.loop(jnp.maximum(count - stages, 0), count)  # a kernel must not end with a barrier's phase unseen
    def _(step):
        plgpu.barrier_wait(ring.freed.at[ring.slot(step)])


def fetch_keys(
    ring: Ring, sources: tuple[Ref, Ref], starts: Ref, first: Any, pair: Any, sizes: Sizes
) -> Callable[[Any, Any], None]:
    """For a pair of tiles of queries: the tiles around it, then past blocks from tile `first` on. sources: [P, W]."""

    def fetch(step: Any, slot: Any) -> None:
        targets, arrived = [x.at[slot] for x in ring.tiles], ring.filled.at[slot]

        @pl.when(step < AROUND)
        def _():
            start = jnp.maximum(pair * WORKERS - 1 + step, 0) * CHUNK
            copy(arrived, sources, targets, [start + i * sizes.slots for i in range(sizes.blocks)], sizes)

        @pl.when(step >= AROUND)
        def _():
            copy_blocks(arrived, sources, targets, starts, first + step - AROUND, sizes)

    return fetch


def copy_blocks(arrived: Ref, sources: Any, targets: Any, starts: Ref, tile: Any, sizes: Sizes) -> None:
    """One tile of past blocks."""
    copy(arrived, sources, targets, [starts[tile * sizes.blocks + i] for i in range(sizes.blocks)], sizes)


def copy(arrived: Ref, sources: Any, targets: Any, starts: list[Any], sizes: Sizes) -> None:
    """A tile from so many places of [P, W]."""
    for i, start in enumerate(starts):
        for source, target in zip(sources, targets, strict=True):
            part = target.at[pl.ds(i * sizes.slots, sizes.slots)]
            plgpu.copy_gmem_to_smem(source.at[pl.ds(start, sizes.slots)], part, arrived)


def along_keys(ring: Ring, count: Any, own: Callable, past: Callable, carry: Any) -> Any:
    """The last carry = own(carry, k, v, which of the tiles around) or past(carry, k, v, number of the tile)."""
    worker = lax.axis_index("worker")
    for i in range(AROUND):
        plgpu.barrier_wait(ring.filled.at[i])
    for i in range(AROUND - WORKERS + 1):
        carry = own(carry, *(x.at[worker + i] for x in ring.tiles), worker + i)
    plgpu.commit_smem()  # all warps have read
    for i in range(AROUND):
        plgpu.barrier_arrive(ring.freed.at[i])

    def turn(tile: Any, carry: Any) -> Any:
        slot = ring.slot(tile + AROUND)
        plgpu.barrier_wait(ring.filled.at[slot])
        carry = past(carry, *(x.at[slot] for x in ring.tiles), tile)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.freed.at[slot])
        return carry

    return lax.fori_loop(0, count, turn, carry)


class Grouped(NamedTuple):
    """A tile of past blocks as its queries see it; vectors along rows are one per block."""

    exponentials: jax.Array
    """Of the scores inside blocks, less the largest of each; 0 at landmarks."""
    totals: list[jax.Array]
    """Their sums."""
    logits: list[jax.Array]
    """Of the landmarks."""


class Layout:
    """Which columns of a tile of past blocks belong together."""

    def __init__(self, sizes: Sizes):
        _, columns = rows_and_columns(SHAPE)
        self.count = sizes.blocks
        self.block = block_of(columns, sizes.slots.bit_length() - 1)
        place = columns & (sizes.slots - 1)
        self.token, self.landmark = place < sizes.real, place == sizes.real

    def reduced(self, x: jax.Array, reduce: Callable, neutral: float) -> list[jax.Array]:
        """Per block, along rows."""
        if self.count == 1:
            return [reduce(x, axis=1)]
        return [reduce(jnp.where(self.block == i, x, neutral), axis=1) for i in range(self.count)]

    def spread(self, vectors: list[jax.Array]) -> jax.Array:
        """The inverse: each block's vector over its columns."""
        *others, out = (along_rows(x, SHAPE) for x in vectors)
        for i, x in enumerate(others):
            out = jnp.where(self.block == i, x, out)
        return out


def scores_of(*pairs: tuple[Ref, Ref], interpret: bool) -> Any:
    """x y^T of each pair of tiles."""
    products = ((zeros(*SHAPE), (x, y.transpose((1, 0)))) for x, y in pairs)
    return accumulate(*products, interpret=interpret)


def own_scores(scores: jax.Array, tile: Any, own: Any) -> tuple[jax.Array, jax.Array]:
    """To base 2, and which of a tile's tokens are seen."""
    _, columns = rows_and_columns(SHAPE)
    first, last = (along_rows(x, SHAPE) for x in own)
    time = columns + tile * CHUNK
    return scores * LOG2E, (first <= time) & (time <= last)


def grouped(scores: jax.Array, layout: Layout) -> Grouped:
    """The softmax inside each block, not yet divided, and the landmarks' logits."""
    scores = scores * LOG2E
    logits = layout.reduced(jnp.where(layout.landmark, scores, 0.0), jnp.sum, 0.0)
    scores = jnp.where(layout.token, scores, NEVER)
    exponentials = jnp.exp2(scores - layout.spread(layout.reduced(scores, jnp.max, NEVER)))
    return Grouped(exponentials, layout.reduced(exponentials, jnp.sum, 0.0), logits)


def seen_blocks(tile: Any, past: Any, sizes: Sizes) -> list[jax.Array]:
    """Whether each query sees the blocks of a tile."""
    numbers = (tile * sizes.blocks + i for i in range(sizes.blocks))
    return [(past[0] <= number) & (number < past[1]) for number in numbers]


def own_slopes(
    scores: jax.Array, of_values: jax.Array, tile: Any, own: Any, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weights, and the scores' slopes; of_values is do.v."""
    scores, seen = own_scores(scores, tile, own)
    weights = jnp.where(seen, jnp.exp2(scores - along_rows(lse, SHAPE)), 0.0)
    return weights, weights * (of_values - along_rows(delta, SHAPE))


def past_slopes(
    scores: jax.Array, of_values: jax.Array, tile: Any, past: Any, lse: jax.Array, delta: jax.Array, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """The same with past blocks; weights are 0 at landmarks."""
    layout = Layout(sizes)
    part = grouped(scores, layout)
    visible = zip(seen_blocks(tile, past, sizes), part.logits, strict=True)
    chosen = [jnp.where(seen, jnp.exp2(logit - lse), 0.0) for seen, logit in visible]
    averages = layout.reduced(part.exponentials * of_values, jnp.sum, 0.0)
    averages = [x / total for x, total in zip(averages, part.totals, strict=True)]
    weights = part.exponentials * layout.spread([p / total for p, total in zip(chosen, part.totals, strict=True)])
    slopes = weights * (of_values - layout.spread(averages))
    of_landmarks = [p * (average - delta) for p, average in zip(chosen, averages, strict=True)]
    return weights, jnp.where(layout.landmark, layout.spread(of_landmarks), slopes)
