"""Rows cut into the blocks of a grid that counts positions within documents.

Documents begin at multiples of the grid, counted from the beginning of the row's first one, which may have begun before
the row: so every block belongs to one document, and a row's first block may have been started already.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Pieces(NamedTuple):
    """The part of each block that lies in the row, N blocks of at most C tokens."""

    source: Int[Array, "N B C"]
    """Index in the row; the last one again where there is no token."""
    inside: Bool[Array, "N B C"]
    place: Int[Array, "N B C"]
    """Place in the block."""


def pieces(length: int, size: int, begun: Int[Array, " B"] | None, rows: int) -> Pieces:
    """The pieces of rows of `length` tokens; `begun`: tokens that each row's first block has already (None: none)."""
    before = 0 if begun is None else size - 1
    start = jnp.zeros(rows, jnp.int32) if begun is None else begun.astype(jnp.int32)
    number = jnp.arange(-(-(length + before) // size), dtype=jnp.int32)[:, None]
    first = jnp.maximum(number * size - start[None], 0)
    last = jnp.minimum((number + 1) * size - start[None], length)
    source = first[..., None] + jnp.arange(min(size, length), dtype=jnp.int32)[None, None]
    place = source + start[None, :, None] - number[..., None] * size
    return Pieces(jnp.minimum(source, length - 1), source < last[..., None], place)


def cut(x: Shaped[Array, "B T ..."], parts: Pieces) -> Shaped[Array, "N B C ..."]:
    """The tokens of every piece."""
    return jax.vmap(lambda index: rows_at(x, index))(parts.source)


def joined(x: Shaped[Array, "N B C ..."], length: int, size: int, begun: Int[Array, " B"] | None) -> Array:
    """Undo `cut`: [B, T, ...]."""
    count, rows, width = x.shape[:3]
    start = jnp.zeros(rows, jnp.int32) if begun is None else begun.astype(jnp.int32)
    at = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    number = at // size
    slot = jnp.where(number == 0, at - start[:, None], at % size)  # a first piece begins with the row
    flat = jnp.moveaxis(x, 0, 1).reshape(rows, count * width, *x.shape[3:])
    return rows_at(flat, number * width + slot)


def off_grid(positions: Int[Array, "B T"], segments: Int[Array, "B T"], parts: Pieces, size: int) -> Bool[Array, " B"]:
    """Rows in which a document begins within a block, or whose positions do not follow one another."""
    at, valid = cut(positions, parts), cut(segments, parts) > 0
    wrong = valid & parts.inside & (at % size != parts.place)
    wrong |= valid & parts.inside & (at - parts.place != (at - parts.place)[..., :1])
    return wrong.any(axis=(0, 2))


def rows_at(x: Shaped[Array, "B T ..."], index: Int[Array, "B N"]) -> Shaped[Array, "B N ..."]:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
