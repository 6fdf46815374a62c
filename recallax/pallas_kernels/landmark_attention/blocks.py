"""The complete blocks of a row, gathered out of its documents, and what a block is.

A document is cut into blocks of `real` tokens and a landmark: position p is the landmark of block p // (real + 1) where
p % (real + 1) = real. Documents may begin anywhere in a row.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.moved import moved


class LandmarkCache(NamedTuple):
    """The blocks of a document so far. Keys carry no position but their place in the block, so that a block can be
    read wherever it is put; a landmark has no value, since it is never read."""

    marks: Float[Array, "B N G K"]
    """Keys of the complete blocks' landmarks, which choose the blocks."""
    k: Float[Array, "B N L G K"]
    v: Float[Array, "B N L G V"]
    own_k: Float[Array, "B L G K"]
    """The unfinished block."""
    own_v: Float[Array, "B L G V"]


class Blocks(NamedTuple):
    """Complete blocks in the order of time, those of a cache first."""

    marks: Float[Array, "B M G K"]
    k: Float[Array, "B M L G K"]
    v: Float[Array, "B M L G V"]
    document: Int[Array, "B M"]
    """Index in the row."""
    number: Int[Array, "B M"]
    """In its document."""
    time: Int[Array, "B M"]
    """Of the landmark in the row: -1 before the row, the row's length where there is no block."""


def complete_blocks(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    docs: Documents,
    positions: Int[Array, "B T"],
    real: int,
    past: LandmarkCache | None,
) -> Blocks:
    """The blocks whose landmark stands in the row, and those of the cache (its first ones; `positions[:, 0]` counts
    what it has seen), which belong to the row's first document."""
    rows, length = positions.shape
    size = real + 1
    count = max(1, (length + (0 if past is None else real)) // size)
    time = jnp.arange(length)[None]
    ends = docs.valid & (positions % size == real)
    rank = jnp.cumsum(ends, axis=1) - 1
    landmark = jnp.sort(jnp.where(ends, time, length), axis=1)[:, :count]
    held = landmark < length
    last = jnp.minimum(landmark, length - 1)

    place = positions % size
    finish = jnp.minimum(time + real - place, length - 1)  # where its landmark would stand
    whole = docs.valid & (place < real) & (time + real - place < length)
    whole &= jnp.take_along_axis(ends, finish, axis=1)
    target = jnp.where(whole, jnp.take_along_axis(rank, finish, axis=1) * real + place, count * real)
    source = landmark[:, :, None] - real + jnp.arange(real)[None, None]
    begun = source < 0  # before the row: in the cache's unfinished block
    source = jnp.where(held[..., None] & ~begun, source, length).reshape(rows, -1)

    def gathered(x: Array, own: Array | None) -> Array:
        """[B, M, L, G, W]"""
        taken = moved(x, source, target).reshape(rows, count, real, *x.shape[2:])
        if own is None:
            return taken
        return jnp.where((begun & held[..., None])[..., None, None], own[:, None].astype(x.dtype), taken)

    def at(x: Array) -> Array:
        return jnp.take_along_axis(x, last, axis=1)

    marks = moved(k, landmark, jnp.where(ends, rank, count))
    number = jnp.where(held, at(positions) // size, 0)
    new = Blocks(
        marks,
        gathered(k, None if past is None else past.own_k),
        gathered(v, None if past is None else past.own_v),
        at(docs.index),
        number,
        landmark,
    )
    return new if past is None else _behind(past, new, positions, size, length)


def _behind(past: LandmarkCache, new: Blocks, positions: Int[Array, "B T"], size: int, length: int) -> Blocks:
    """The cache's blocks, then the new ones; an empty slot may hold anything, NaN included."""
    number = jnp.broadcast_to(jnp.arange(past.marks.shape[1])[None], past.marks.shape[:2])
    filled = number < positions[:, :1] // size
    marks, k, v = (jnp.where(filled.reshape(*filled.shape, *[1] * (x.ndim - 2)), x, 0) for x in past[:3])
    old = Blocks(marks, k, v, jnp.zeros_like(number), number, jnp.where(filled, -1, length))
    joined = (jnp.concatenate([a.astype(b.dtype), b], axis=1) for a, b in zip(old, new, strict=True))
    return Blocks(*joined)


def seen_from(blocks: Blocks, document: Int[Array, "B C"], time: Int[Array, " C"]) -> Bool[Array, "B C M"]:
    """Whether tokens at these times of a row see a block: it is of their document and complete before them."""
    return (blocks.document[:, None] == document[:, :, None]) & (blocks.time[:, None] < time[None, :, None])


class Near(NamedTuple):
    """What tokens see token by token: their own block. Slot `real + t` holds the row's token t, so that the slots in
    front hold what a cache's unfinished block has of the tokens before the row."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G V"]
    begin: Int[Array, "B S"]
    """When the token's block began, in the row's time, which tells its blocks apart; below every query's where nobody
    sees the slot."""


def near(
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    docs: Documents,
    positions: Int[Array, "B T"],
    real: int,
    past: LandmarkCache | None,
) -> Near:
    """The tokens that can be seen one by one: all but landmarks and padding."""
    size = real + 1
    place, time = positions % size, jnp.arange(positions.shape[1])[None]
    begin = jnp.where(docs.valid & (place < real), time - place, -size)
    if past is None:
        pad = ((0, 0), (real, 0))
        keys, values = (jnp.pad(x, (*pad, (0, 0), (0, 0))) for x in (k, v))
        return Near(keys, values, jnp.pad(begin, pad, constant_values=-size))
    source = jnp.arange(real)[None] - real + place[:, :1]  # so that the newest stands right before the row
    held = source >= 0
    at = jnp.maximum(source, 0)[..., None, None]

    def behind(own: Array, x: Array) -> Array:
        before = jnp.where(held[..., None, None], jnp.take_along_axis(own, at, axis=1), 0)
        return jnp.concatenate([before.astype(x.dtype), x], axis=1)

    before = jnp.where(held, -place[:, :1], -size)
    return Near(behind(past.own_k, k), behind(past.own_v, v), jnp.concatenate([before, begin], axis=1))
