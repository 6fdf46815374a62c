"""Arrays of a chunk scan, and where the matrices of each grid step lie in them."""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array

from recallax.pallas_kernels.mosaic_tpu.chunk_grid import ChunkGrid


@dataclass(frozen=True)
class ChunkOperand(abc.ABC):
    """An array, or the shape and dtype of an output, and where the matrices of each grid step lie in it."""

    array: Any

    @abc.abstractmethod
    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        """Return the block of a grid step."""

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        """Load the matrices of the step's value heads, [heads_per_step, ...]."""
        return ref[0]

    def write(self, ref: Any, value: Array) -> None:
        """Store the matrices of the step's value heads, cast to the array's dtype."""
        ref[0] = value.astype(ref.dtype)


class TokenOperand(ChunkOperand):
    """[B, G, T, W] with matrices [C, W]; each of G heads is shared by H / G consecutive value heads."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        _, groups, _, width = self.array.shape
        share = chunk_grid.num_heads // groups
        block_heads = max(1, chunk_grid.heads_per_step // share)
        steps_per_block = max(1, share // chunk_grid.heads_per_step)
        return pl.BlockSpec(
            (1, block_heads, chunk_grid.chunk_size, width),
            lambda b, h, n: (b, h // steps_per_block, chunk_grid.chunk_index(n), 0),
        )

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        share = chunk_grid.num_heads // self.array.shape[1]
        return ref[0] if share == 1 else jnp.stack([ref[0, h // share] for h in range(chunk_grid.heads_per_step)])


class StateOperand(ChunkOperand):
    """[B, H, K, V] with matrices [K, V], the same block for all chunks."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, chunk_grid.heads_per_step, *self.array.shape[2:]), lambda b, h, n: (b, h, 0, 0))


@dataclass(frozen=True)
class ChannelOperand(ChunkOperand):
    """[B, T, D] with matrices [C, lanes]; a group of `lanes` channels acts as a head. One head per grid step."""

    lanes: int

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, chunk_grid.chunk_size, self.lanes), lambda b, h, n: (b, chunk_grid.chunk_index(n), h))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[...]

    def write(self, ref: Any, value: Array) -> None:
        ref[...] = value.astype(ref.dtype)


class PerHeadOperand(ChunkOperand):
    """[H, R, W] with matrices [R, W], the same for all rows and chunks. One head per grid step."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec((1, *self.array.shape[1:]), lambda b, h, n: (h, 0, 0))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[...]


class SharedOperand(ChunkOperand):
    """[R, W], one matrix that all grid steps share."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        return pl.BlockSpec(self.array.shape, lambda b, h, n: (0, 0))

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return jnp.broadcast_to(ref[...], (chunk_grid.heads_per_step, *self.array.shape))


class PerChunkOperand(ChunkOperand):
    """[B, H, N, R, W], one matrix per chunk: a state, or rows of scalars per token."""

    def spec(self, chunk_grid: ChunkGrid) -> pl.BlockSpec:
        shape = self.array.shape[3:]
        return pl.BlockSpec(
            (1, chunk_grid.heads_per_step, 1, *shape), lambda b, h, n: (b, h, chunk_grid.chunk_index(n), 0, 0)
        )

    def read(self, ref: Any, chunk_grid: ChunkGrid) -> Array:
        return ref[0, :, 0]

    def write(self, ref: Any, value: Array) -> None:
        ref[0, :, 0] = value.astype(ref.dtype)


def output_shape(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)
