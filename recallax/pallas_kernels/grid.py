"""Rows cut into the blocks of a grid that counts positions within documents.

Documents begin at multiples of the grid, counted from the beginning of the row's first one, which may have begun before
the row: so every block belongs to one document, and a row's first block may have been started already.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class GridBlocks(NamedTuple):
    """The part of each block that lies in the row, N blocks of at most C tokens."""

    token_index: Int[Array, "N B C"]
    """Index in the row; the last one again where there is no token."""
    mask: Bool[Array, "N B C"]
    offset: Int[Array, "N B C"]
    """Place in the block."""


def grid_blocks(length: int, block_size: int, block_offset: Int[Array, " B"] | None, batch: int) -> GridBlocks:
    """The pieces of rows of `length` tokens; `block_offset`: tokens that each row's first block has already (None: none)."""
    before = 0 if block_offset is None else block_size - 1
    start = jnp.zeros(batch, jnp.int32) if block_offset is None else block_offset.astype(jnp.int32)
    number = jnp.arange(-(-(length + before) // block_size), dtype=jnp.int32)[:, None]
    first = jnp.maximum(number * block_size - start[None], 0)
    last = jnp.minimum((number + 1) * block_size - start[None], length)
    source = first[..., None] + jnp.arange(min(block_size, length), dtype=jnp.int32)[None, None]
    place = source + start[None, :, None] - number[..., None] * block_size
    return GridBlocks(jnp.minimum(source, length - 1), source < last[..., None], place)


def split_grid_blocks(x: Shaped[Array, "B T ..."], blocks: GridBlocks) -> Shaped[Array, "N B C ..."]:
    """The tokens of every piece."""
    return jax.vmap(lambda index: gather_tokens(x, index))(blocks.token_index)


def merge_grid_blocks(
    x: Shaped[Array, "N B C ..."], length: int, block_size: int, block_offset: Int[Array, " B"] | None
) -> Array:
    """Undo `split_grid_blocks`: [B, T, ...]."""
    count, rows, width = x.shape[:3]
    start = jnp.zeros(rows, jnp.int32) if block_offset is None else block_offset.astype(jnp.int32)
    at = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    number = at // block_size
    slot = jnp.where(number == 0, at - start[:, None], at % block_size)  # a first piece begins with the row
    flat = jnp.moveaxis(x, 0, 1).reshape(rows, count * width, *x.shape[3:])
    return gather_tokens(flat, number * width + slot)


def misaligned_rows(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], blocks: GridBlocks, block_size: int
) -> Bool[Array, " B"]:
    """Rows in which a document begins within a block, or whose positions do not follow one another."""
    at, valid = split_grid_blocks(positions, blocks), split_grid_blocks(segment_ids, blocks) > 0
    wrong = valid & blocks.mask & (at % block_size != blocks.offset)
    wrong |= valid & blocks.mask & (at - blocks.offset != (at - blocks.offset)[..., :1])
    return wrong.any(axis=(0, 2))


def gather_tokens(x: Shaped[Array, "B T ..."], index: Int[Array, "B N"]) -> Shaped[Array, "B N ..."]:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
