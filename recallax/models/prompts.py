"""Prompts of different lengths as one array: padded on either side, or unpacked from packed rows."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recallax.types import AnyArray, SeqInfo, check_shapes

type PaddingSide = Literal["left", "right"]
type TokenIds = Sequence[int] | Int[np.ndarray, " _"]


class PromptError(ValueError):
    """Raised for prompts that a model cannot read; the message names the prompt, the reason and the remedy."""


class Prompts(NamedTuple):
    """A batch of prompts, one document per row, in numpy."""

    tokens: Int[np.ndarray, "B T"]
    """Token ids."""
    seq: SeqInfo
    """Positions, document ids (0 at padding) and prefixes."""

    @property
    def valid(self) -> Bool[np.ndarray, "B T"]:
        """True at tokens, False at padding."""
        return np.asarray(self.seq.segment_ids) > 0

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Number of tokens of each prompt."""
        return self.valid.sum(axis=1)

    @property
    def prefix_lengths(self) -> Int[np.ndarray, " B"]:
        """Number of tokens of each prompt's prefix."""
        return (np.asarray(self.seq.prefix) & self.valid).sum(axis=1)


def pad_prompts(
    prompts: Sequence[TokenIds],
    *,
    padding_side: PaddingSide = "right",
    prefix_lengths: int | Sequence[int] = 0,
    length: int | None = None,
) -> Prompts:
    """Pad prompts to one length.

    Args:
        prompts: Token ids of each prompt.
        padding_side: The side of the padding; results do not depend on it.
        prefix_lengths: Tokens at the start of each prompt that may be read in both directions (`SeqInfo.prefix`): one
            number for all prompts, or one per prompt.
        length: The length of the rows. None: that of the longest prompt.

    Returns:
        The prompts.

    Raises:
        PromptError: If there are no prompts, a prompt is longer than `length`, a prefix is longer than its prompt, or
            an id is invalid.
    """
    if not len(prompts):
        raise PromptError("there are no prompts; give at least one")
    lengths = np.array([len(prompt) for prompt in prompts])
    row_length = max(int(lengths.max()), 1) if length is None else length
    if lengths.max() > row_length:
        raise PromptError(
            f"prompt {lengths.argmax()} has {lengths.max()} tokens; it must have at most length={row_length}"
        )
    prefixes = np.broadcast_to(np.asarray(prefix_lengths), lengths.shape)
    for row, (size, prefix) in enumerate(zip(lengths.tolist(), prefixes.tolist(), strict=True)):
        if not 0 <= prefix <= size:
            raise PromptError(
                f"the prefix of prompt {row} is {prefix} tokens; it must be from 0 to the prompt's {size}"
            )
    first = row_length - lengths if padding_side == "left" else np.zeros_like(lengths)
    tokens = np.zeros((len(prompts), row_length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, first[row] : first[row] + len(prompt)] = _token_ids(row, prompt)
    positions = np.arange(row_length)[None] - first[:, None]
    valid = (positions >= 0) & (positions < lengths[:, None])
    prefix_mask = valid & (positions < prefixes[:, None])
    seq = SeqInfo(np.where(valid, positions, 0).astype(np.int32), valid.astype(np.int32), prefix_mask)
    return Prompts(tokens, seq)


def unpack_documents(tokens: Int[AnyArray, "B T"], seq: SeqInfo) -> Prompts:
    """Move every document of packed rows to a row of its own, since a state belongs to one document.

    Args:
        tokens: Token ids of packed rows.
        seq: Their sequence information.

    Returns:
        One document per row, in the order of the packed rows, padded on the right.
    """
    check_shapes(seq)
    tokens, segment_ids, prefix = (np.asarray(part) for part in (tokens, seq.segment_ids, seq.prefix))
    documents, prefixes = [], []
    for row, row_ids, row_prefix in zip(tokens, segment_ids, prefix, strict=True):
        for segment_id in dict.fromkeys(row_ids[row_ids > 0].tolist()):  # in the order of the row
            documents.append(row[row_ids == segment_id])
            prefixes.append(int(row_prefix[row_ids == segment_id].sum()))
    return pad_prompts(documents, prefix_lengths=prefixes or 0)


def validate_prompts(prompts: Prompts, vocab_size: int) -> Prompts:
    """Check that every row is one document from its start, with valid token ids.

    Args:
        prompts: The prompts.
        vocab_size: The model's vocabulary size.

    Returns:
        The prompts.

    Raises:
        PromptError: If a row is empty, has several documents, wrong positions, a prefix that is not at the start, or an
            invalid id.
    """
    check_shapes(prompts.seq)
    tokens, valid = prompts.tokens, prompts.valid
    if tokens.shape != valid.shape:
        raise PromptError(f"tokens have shape {tokens.shape}, seq has {valid.shape}; the two must agree")
    positions, segment_ids, prefix = (np.asarray(part) for part in prompts.seq[:3])
    for row in range(len(tokens)):
        mask = valid[row]
        if not mask.any():
            raise PromptError(f"prompt {row} is empty; give it at least one token")
        if len(np.unique(segment_ids[row][mask])) > 1:
            raise PromptError(f"row {row} has several documents; `unpack_documents` moves each to its own row")
        count = int(mask.sum())
        if not np.array_equal(positions[row][mask], np.arange(count)) or np.ptp(np.flatnonzero(mask)) != count - 1:
            raise PromptError(
                f"row {row} does not have the positions 0 to {count - 1} without gaps; use `pad_prompts` to make rows"
            )
        if not np.array_equal(prefix[row][mask], np.arange(count) < prefix[row][mask].sum()):
            raise PromptError(f"the prefix of prompt {row} is not at its start")
        invalid = tokens[row][mask & ((tokens[row] < 0) | (tokens[row] >= vocab_size))]
        if invalid.size:
            raise PromptError(f"prompt {row} has the token {invalid[0]}; ids of this model are 0 to {vocab_size - 1}")
    return prompts


def _token_ids(row: int, prompt: TokenIds) -> Int[np.ndarray, " _"]:
    ids = np.asarray(prompt, dtype=None if len(prompt) else np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"prompt {row} has shape {ids.shape} and dtype {ids.dtype}; it must be a list of token ids")
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise PromptError(f"prompt {row} has the token {ids.min() if ids.min() < 0 else ids.max()}; ids are 0 and more")
    return ids
