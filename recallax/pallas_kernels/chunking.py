"""Documents within a row, and time split into chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which sums over time are taken: float32, or float64 for the tests' oracles."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


class Documents(NamedTuple):
    """The documents of each row. Padding counts to the document before it, leading padding to the first one."""

    index: Int[Array, "B T"]
    """0 for the row's first document (the one an incoming state belongs to), then 1, 2, ... without gaps."""
    valid: Bool[Array, "B T"]
    """False at padding."""


def documents(segments: Int[Array, "B T"]) -> Documents:
    """Number the documents of each row. Segment ids need not be ordered; 0 is padding."""
    valid = segments > 0
    last = jax.lax.cummax(jnp.where(valid, jnp.arange(segments.shape[1])[None], -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1)
    starts = valid & (before >= 0) & (segments != previous)
    return Documents(jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid)


def one_document(rows: int, length: int) -> Documents:
    """Rows of one document each, without padding."""
    return Documents(jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool))


def last_valid(docs: Documents) -> Int[Array, " B"]:
    """Index of the last token of each row that is not padding; -1 in an empty row."""
    time = jnp.arange(docs.valid.shape[1])[None]
    return jnp.max(jnp.where(docs.valid, time, -1), axis=1)


class Masks(NamedTuple):
    """What a chunk's tokens may see, given the document that the incoming state belongs to."""

    visible: Bool[Array, "B C C"]
    """Token i may read token j: j <= i, one document, j is not padding."""
    own: Bool[Array, "B C"]
    """Tokens of the incoming state's document."""
    kept: Bool[Array, "B C"]
    """Tokens that the outgoing state holds: those of the last document."""
    stays: Bool[Array, " B"]
    """The last document is the incoming state's."""


def masks_of(docs: Documents, document: Int[Array, " B"]) -> Masks:
    """The masks of one chunk; `document` is the index of the incoming state's document."""
    last = docs.index[:, -1]
    time = jnp.arange(docs.index.shape[1])
    same = docs.index[:, :, None] == docs.index[:, None, :]
    visible = (time[:, None] >= time[None])[None] & same & docs.valid[:, None, :]
    return Masks(visible, docs.index == document[:, None], docs.valid & (docs.index == last[:, None]), last == document)


def weight(mask: Bool[Array, "..."], log: Float[Array, "... H W"] | None) -> Float[Array, "... H W"]:
    """exp(log) where the mask holds and 0 elsewhere, in float32; [..., 1, 1] without a decay."""
    mask = mask[..., None, None]
    if log is None:
        return mask.astype(jnp.float32)
    return jnp.where(mask, jnp.exp(jnp.where(mask, log, 0)), 0)


def split_time(x: Shaped[Array, "B T ..."], chunk: int) -> Shaped[Array, "N B C ..."]:
    """Cut time into chunks along a new leading axis, padding the end by repeating the last entry."""
    pad = -x.shape[1] % chunk
    if pad:
        x = jnp.concatenate([x, jnp.repeat(x[:, -1:], pad, axis=1)], axis=1)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def join_time(x: Shaped[Array, "N B C ..."], length: int) -> Shaped[Array, "B T ..."]:
    """Undo `split_time`, dropping what it padded."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
