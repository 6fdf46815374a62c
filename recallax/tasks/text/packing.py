"""Packing of documents into rows: next-token targets, positions and segment ids.

Row i of a stream has `length` tokens, from token i * (length - grid) on. Documents that share a row get segment ids of
their own, so that no state and no attention crosses a document boundary.
"""

import numpy as np
from jaxtyping import Int

from recallax.tasks.text.tokenized_corpus import TokenStream
from recallax.types import Batch, SeqInfo


def pack_rows(stream: TokenStream, rows: Int[np.ndarray, " B"], length: int, grid: int) -> Batch:
    """Read rows of a stream.

    Args:
        stream: The documents of a split.
        rows: Numbers of the rows.
        length: Row length in tokens.
        grid: Documents start at multiples of it.

    Returns:
        A batch with next-token targets, weights of 0 and 1, and all targets in group 0.
    """
    first = rows * (length - grid)
    time = np.arange(length)
    at = first[:, None] + time
    real = at < len(stream.tokens)
    tokens = np.asarray(stream.tokens[np.minimum(at, len(stream.tokens) - 1)]).astype(np.int32) * real

    # Documents that start inside each row, after its first token: numbers low to high - 1.
    low, high = np.searchsorted(stream.starts, first, "right"), np.searchsorted(stream.starts, first + length)
    is_start = np.zeros(real.shape, bool)
    row = np.repeat(np.arange(len(rows)), high - low)
    document = np.arange(len(row)) + np.repeat(low - np.cumsum(high - low) + high - low, high - low)
    is_start[row, np.asarray(stream.starts[document]) - first[row]] = True

    segment = np.cumsum(is_start, axis=1)
    ends = np.asarray(stream.ends[low[:, None] - 1 + segment])
    labelled = at + 1 < ends
    labelled[:, -1] = False
    labelled[rows > 0, : grid - 1] = False  # targets of the row before
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:] * labelled[:, :-1]
    seq = SeqInfo(
        (time - np.maximum.accumulate(np.where(is_start, time, 0), axis=1)).astype(np.int32),
        ((segment + 1) * real).astype(np.int32),
        np.zeros(real.shape, bool),
    )
    return Batch(tokens, targets, labelled.astype(np.float32), np.zeros_like(tokens), np.zeros_like(tokens), seq)


def num_rows(stream: TokenStream, length: int, grid: int) -> int:
    """Return the number of rows of `length` tokens that `pack_rows` reads from a stream.

    Args:
        stream: The tokens.
        length: Tokens of a row.
        grid: Tokens by which consecutive rows overlap.
    """
    return -(-(len(stream.tokens) - grid) // (length - grid))
