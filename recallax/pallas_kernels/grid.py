"""Split rows into blocks of a grid that counts positions within documents.

Documents begin at multiples of the block size, counted from the start of the row's first document, which may lie before
the row. So every block belongs to one document, and the row's first block may be incomplete at its start.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class GridBlocks(NamedTuple):
    """Tokens of the row in each of N blocks, at most C per block."""

    token_index: Int[Array, "N B C"]
    """Index in the row; the last index of the row where `mask` is False."""
    mask: Bool[Array, "N B C"]
    """True where the block has a token of the row."""
    offset: Int[Array, "N B C"]
    """Index in the block."""


def grid_blocks(length: int, block_size: int, block_offset: Int[Array, " B"] | None, batch: int) -> GridBlocks:
    """Split rows into the blocks of their grid.

    Args:
        length: Tokens of a row.
        block_size: Tokens of a block.
        block_offset: Tokens of each row's first block that precede the row; None: 0.
        batch: Number of rows.
    """
    max_offset = 0 if block_offset is None else block_size - 1
    start = jnp.zeros(batch, jnp.int32) if block_offset is None else block_offset.astype(jnp.int32)
    block = jnp.arange(-(-(length + max_offset) // block_size), dtype=jnp.int32)[:, None]
    first = jnp.maximum(block * block_size - start[None], 0)
    end = jnp.minimum((block + 1) * block_size - start[None], length)
    index = first[..., None] + jnp.arange(min(block_size, length), dtype=jnp.int32)[None, None]
    offset = index + start[None, :, None] - block[..., None] * block_size
    return GridBlocks(jnp.minimum(index, length - 1), index < end[..., None], offset)


def split_grid_blocks(x: Shaped[Array, "B T ..."], blocks: GridBlocks) -> Shaped[Array, "N B C ..."]:
    """Gather the tokens of every block.

    Args:
        x: Entries of each row.
        blocks: Blocks of the rows.

    Returns:
        The entries at `blocks.token_index`.
    """
    return jax.vmap(lambda index: gather_tokens(x, index))(blocks.token_index)


def merge_grid_blocks(
    x: Shaped[Array, "N B C ..."], length: int, block_size: int, block_offset: Int[Array, " B"] | None
) -> Array:
    """Undo `split_grid_blocks`.

    Args:
        x: Entries of each block.
        length: Tokens of a row.
        block_size: Tokens of a block.
        block_offset: Tokens of each row's first block that precede the row; None: 0.

    Returns:
        Entries of each row [B, T, ...].
    """
    count, rows, width = x.shape[:3]
    start = jnp.zeros(rows, jnp.int32) if block_offset is None else block_offset.astype(jnp.int32)
    grid_position = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    block = grid_position // block_size
    # The entries of the first block begin with the row, not with the block.
    slot = jnp.where(block == 0, grid_position - start[:, None], grid_position % block_size)
    flat = jnp.moveaxis(x, 0, 1).reshape(rows, count * width, *x.shape[3:])
    return gather_tokens(flat, block * width + slot)


def misaligned_rows(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], blocks: GridBlocks, block_size: int
) -> Bool[Array, " B"]:
    """Return True for rows in which a document begins inside a block or positions are not consecutive.

    Args:
        positions: Positions within documents.
        segment_ids: Document ids; 0 is padding.
        blocks: Blocks of the rows.
        block_size: Tokens of a block.
    """
    position, valid = split_grid_blocks(positions, blocks), split_grid_blocks(segment_ids, blocks) > 0
    start = position - blocks.offset
    wrong = valid & blocks.mask & (position % block_size != blocks.offset)
    wrong |= valid & blocks.mask & (start != start[..., :1])
    return wrong.any(axis=(0, 2))


def gather_tokens(x: Shaped[Array, "B T ..."], index: Int[Array, "B N"]) -> Shaped[Array, "B N ..."]:
    """Return x[b, index[b, n]] for every row b.

    Args:
        x: Entries of each row.
        index: Indices of tokens in their row, from 0 to T - 1.
    """
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
