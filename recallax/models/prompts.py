"""Prompts of different lengths as one array: padded on either side, or taken out of packed rows."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recallax.types import AnyArray, SeqInfo, check_shapes

type PaddingSide = Literal["left", "right"]
type TokenIds = Sequence[int] | Int[np.ndarray, " _"]


class PromptError(ValueError):
    """A prompt that cannot be read; the message says which, why, and what would do."""


class Prompts(NamedTuple):
    """One document per row, in numpy."""

    tokens: Int[np.ndarray, "B T"]
    seq: SeqInfo

    @property
    def valid(self) -> Bool[np.ndarray, "B T"]:
        """Where there are tokens."""
        return np.asarray(self.seq.segment_ids) > 0

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens of each prompt."""
        return self.valid.sum(axis=1)

    @property
    def prefix_lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens of each prompt's prefix."""
        return (np.asarray(self.seq.prefix) & self.valid).sum(axis=1)


def pad_prompts(
    prompts: Sequence[TokenIds],
    *,
    padding_side: PaddingSide = "right",
    prefix_lengths: int | Sequence[int] = 0,
    length: int | None = None,
) -> Prompts:
    """Token ids of B prompts as rows of `length` (None: of the longest) tokens.

    side: where the padding stands; results do not depend on it. prefix: tokens that each prompt begins with and that
    may be read in both directions (`SeqInfo.prefix`), one number for all or one each. Raises PromptError.
    """
    if not len(prompts):
        raise PromptError("there are no prompts; give at least one")
    sizes = np.array([len(prompt) for prompt in prompts])
    room = max(int(sizes.max()), 1) if length is None else length
    if sizes.max() > room:
        raise PromptError(f"prompt {sizes.argmax()} has {sizes.max()} tokens; rows of {room} have no room for it")
    prefixes = np.broadcast_to(np.asarray(prefix_lengths), sizes.shape)
    for row, (size, some) in enumerate(zip(sizes.tolist(), prefixes.tolist(), strict=True)):
        if not 0 <= some <= size:
            raise PromptError(f"the prefix of prompt {row} is {some} tokens; it must be from 0 to the prompt's {size}")
    first = room - sizes if padding_side == "left" else np.zeros_like(sizes)
    tokens = np.zeros((len(prompts), room), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, first[row] : first[row] + len(prompt)] = _token_ids(row, prompt)
    place = np.arange(room)[None] - first[:, None]
    valid = (place >= 0) & (place < sizes[:, None])
    seq = SeqInfo(
        np.where(valid, place, 0).astype(np.int32), valid.astype(np.int32), valid & (place < prefixes[:, None])
    )
    return Prompts(tokens, seq)


def unpack_documents(tokens: Int[AnyArray, "B T"], seq: SeqInfo) -> Prompts:
    """One row per document of packed rows, in their order, padded on the right: a state belongs to one document."""
    check_shapes(seq)
    tokens, segments, prefix = (np.asarray(part) for part in (tokens, seq.segment_ids, seq.prefix))
    found, prefixes = [], []
    for row, marks, ahead in zip(tokens, segments, prefix, strict=True):
        for number in dict.fromkeys(marks[marks > 0].tolist()):  # in the order of the row
            found.append(row[marks == number])
            prefixes.append(int(ahead[marks == number].sum()))
    return pad_prompts(found, prefix_lengths=prefixes or 0)


def validate_prompts(prompts: Prompts, vocab_size: int) -> Prompts:
    """The same. Raises PromptError where a row is not one document of token ids from its beginning."""
    check_shapes(prompts.seq)
    tokens, valid = prompts.tokens, prompts.valid
    if tokens.shape != valid.shape:
        raise PromptError(f"tokens have shape {tokens.shape}, their information {valid.shape}; the two must agree")
    positions, segments, prefix = (np.asarray(part) for part in prompts.seq[:3])
    for row in range(len(tokens)):
        here = valid[row]
        if not here.any():
            raise PromptError(f"prompt {row} is empty; give it at least one token")
        if len(np.unique(segments[row][here])) > 1:
            raise PromptError(f"row {row} holds several documents; `unpacked` gives each a row of its own")
        count = int(here.sum())
        if not np.array_equal(positions[row][here], np.arange(count)) or np.ptp(np.flatnonzero(here)) != count - 1:
            raise PromptError(f"row {row} is not the positions 0 to {count - 1} in one piece; `padded` makes such rows")
        if not np.array_equal(prefix[row][here], np.arange(count) < prefix[row][here].sum()):
            raise PromptError(f"the prefix of prompt {row} is not how it begins")
        wrong = tokens[row][here & ((tokens[row] < 0) | (tokens[row] >= vocab_size))]
        if wrong.size:
            raise PromptError(f"prompt {row} has the token {wrong[0]}; ids of this model are 0 to {vocab_size - 1}")
    return prompts


def _token_ids(row: int, prompt: TokenIds) -> Int[np.ndarray, " _"]:
    ids = np.asarray(prompt, dtype=None if len(prompt) else np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"prompt {row} has shape {ids.shape} and dtype {ids.dtype}; it must be a list of token ids")
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise PromptError(f"prompt {row} has the token {ids.min() if ids.min() < 0 else ids.max()}; ids are 0 and more")
    return ids
