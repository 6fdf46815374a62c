"""Documents within a row, and time split into chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped


def accumulator_dtype(dtype: DTypeLike) -> DTypeLike:
    """Dtype of sums over time: float64 for float64 inputs (the tests' oracles), else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


class DocumentIds(NamedTuple):
    """Documents of each row. Padding belongs to the document before it; leading padding belongs to the first one."""

    index: Int[Array, "B T"]
    """Document number within the row: 0, 1, 2, ... An incoming state belongs to document 0."""
    valid: Bool[Array, "B T"]
    """False at padding."""


def index_documents(segment_ids: Int[Array, "B T"]) -> DocumentIds:
    """Number the documents of each row.

    Args:
        segment_ids: Document ids in any order; 0 is padding.

    Returns:
        Consecutive document indices and the mask of valid tokens.
    """
    valid = segment_ids > 0
    last = jax.lax.cummax(jnp.where(valid, jnp.arange(segment_ids.shape[1])[None], -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = valid & (before >= 0) & (segment_ids != previous)
    return DocumentIds(jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid)


def single_document(batch: int, length: int) -> DocumentIds:
    """Return the document ids of rows that are one document each, without padding.

    Args:
        batch: Number of rows.
        length: Tokens of a row.
    """
    return DocumentIds(jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool))


def to_segment_ids(document_ids: DocumentIds) -> Int[Array, "B T"]:
    """Segment ids that `index_documents` maps to these documents: index + 1, and 0 for padding."""
    return jnp.where(document_ids.valid, document_ids.index + 1, 0)


def last_valid(document_ids: DocumentIds) -> Int[Array, " B"]:
    """Index of the last valid token of each row; -1 in a row without valid tokens."""
    time = jnp.arange(document_ids.valid.shape[1])[None]
    return jnp.max(jnp.where(document_ids.valid, time, -1), axis=1)


class ChunkMasks(NamedTuple):
    """Masks of a chunk, given the document that the incoming state belongs to."""

    visible: Bool[Array, "B C C"]
    """True where token i reads token j: j <= i, same document, and j is not padding."""
    in_state_document: Bool[Array, "B C"]
    """True for tokens of the incoming state's document."""
    in_last_document: Bool[Array, "B C"]
    """True for the valid tokens of the last document, which the outgoing state contains."""
    keeps_state: Bool[Array, " B"]
    """True if the last document is the incoming state's document."""


def chunk_masks(document_ids: DocumentIds, state_document: Int[Array, " B"]) -> ChunkMasks:
    """Return the masks of one chunk.

    Args:
        document_ids: Documents of the chunk's tokens.
        state_document: Index of the incoming state's document.
    """
    last = document_ids.index[:, -1]
    time = jnp.arange(document_ids.index.shape[1])
    same = document_ids.index[:, :, None] == document_ids.index[:, None, :]
    visible = (time[:, None] >= time[None])[None] & same & document_ids.valid[:, None, :]
    return ChunkMasks(
        visible,
        document_ids.index == state_document[:, None],
        document_ids.valid & (document_ids.index == last[:, None]),
        last == state_document,
    )


def masked_exp(mask: Bool[Array, "..."], log_decay: Float[Array, "... H W"] | None) -> Float[Array, "... H W"]:
    """Return exp(log_decay) where the mask is True and 0 elsewhere.

    Args:
        mask: The mask.
        log_decay: Natural log-decay. None: 0, so that the result is the mask.

    Returns:
        The factors in float32.
    """
    mask = mask[..., None, None]
    if log_decay is None:
        return mask.astype(jnp.float32)
    return jnp.where(mask, jnp.exp(jnp.where(mask, log_decay, 0)), 0)


def split_time(x: Shaped[Array, "B T ..."], chunk_size: int) -> Shaped[Array, "N B C ..."]:
    """Split time into chunks along a new leading axis; the end is padded with copies of the last entry.

    Args:
        x: Entries of each row.
        chunk_size: Tokens C of a chunk.
    """
    pad = -x.shape[1] % chunk_size
    if pad:
        x = jnp.concatenate([x, jnp.repeat(x[:, -1:], pad, axis=1)], axis=1)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 1, 0)


def join_time(x: Shaped[Array, "N B C ..."], length: int) -> Shaped[Array, "B T ..."]:
    """Undo `split_time` and remove its padding.

    Args:
        x: Entries of each chunk.
        length: Tokens T of a row, without the padding.
    """
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
