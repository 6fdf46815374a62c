"""Recall tokens: tokens that can be recalled from the context but are unlikely to be known from training.

A token is a recall token if it ends an n-gram that occurs earlier in the same document of the row and at most
`Text.max_ngram_count` times in the train split. The publication uses bigrams and 1250 occurrences in 10 billion tokens
of the Pile. Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), section 3.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, Integer

from recallax.tasks.text.permutation import splitmix64

HASH_BITS = 24
"""Bits of the hash of the first counting pass: 128 MiB of counters for a corpus of any size."""
TOKENS_PER_PIECE = 2**22
"""Tokens that are counted at a time, to bound the memory."""


def ngram_ids(tokens: Integer[np.ndarray, "*rows N"], n: int, vocab_size: int) -> Int[np.ndarray, "*rows M"]:
    """Encode every n-gram as one integer.

    Args:
        tokens: Token ids.
        n: Length of the n-grams.
        vocab_size: Number of token ids; vocab_size**n must be below 2**63.

    Returns:
        Integers that differ for different n-grams, M = N - n + 1 per row.
    """
    count = max(tokens.shape[-1] - n + 1, 0)
    numbers = np.zeros((*tokens.shape[:-1], count), np.int64)
    for i in range(n):
        numbers = numbers * vocab_size + tokens[..., i : i + count]
    return numbers


def recall_mask(
    tokens: Int[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
    n: int,
    vocab_size: int,
    frequent_ngrams: Int[np.ndarray, " F"],
) -> Bool[np.ndarray, "B T"]:
    """Mark the recall tokens of packed rows.

    Args:
        tokens: Token ids.
        segment_ids: Document number of each token; the tokens of a document are contiguous.
        n: Length of the n-grams.
        vocab_size: Number of token ids.
        frequent_ngrams: Result of the function `frequent_ngrams`: n-grams whose repeats are not recall, sorted.

    Returns:
        True for tokens that end an n-gram which occurs earlier in their document and is not frequent.
    """
    is_recall = np.zeros(tokens.shape, bool)
    if tokens.shape[1] <= n:
        return is_recall
    numbers = ngram_ids(tokens, n, vocab_size)
    start = np.arange(numbers.shape[1])
    end_segment = segment_ids[:, n - 1 :]
    # An n-gram that spans two documents gets a unique number.
    numbers = np.where(end_segment == segment_ids[:, : len(start)], numbers, -1 - start)
    order = np.argsort(numbers, axis=1, kind="stable")
    run, segment = (np.take_along_axis(x, order, axis=1) for x in (numbers, end_segment))
    # Equal n-grams are adjacent after the stable sort, in the order of the row, and documents are contiguous.
    repeated = np.zeros(numbers.shape, bool)
    repeated[:, 1:] = (run[:, 1:] == run[:, :-1]) & (segment[:, 1:] == segment[:, :-1])
    np.put_along_axis(is_recall[:, n - 1 :], order, repeated, axis=1)
    is_recall[:, n - 1 :] &= ~_is_member(numbers, frequent_ngrams)
    return is_recall


def frequent_ngrams(
    tokens: Integer[np.ndarray, " S"], starts: Int[np.ndarray, " D"], n: int, vocab_size: int, max_count: int
) -> Int[np.ndarray, " F"]:
    """Find the n-grams that occur within documents more than `max_count` times.

    The first of two passes counts by a hash, which bounds each n-gram's count from above. The second pass counts
    exactly the n-grams that may be frequent. So the memory does not grow with the number of different n-grams.

    Args:
        tokens: Token ids of all documents.
        starts: First index of each document.
        n: Length of the n-grams.
        vocab_size: Number of token ids.
        max_count: Largest count that is not frequent.

    Returns:
        The numbers of the frequent n-grams (see `ngram_ids`), sorted.
    """
    bound = np.zeros(2**HASH_BITS, np.int64)
    for numbers in _ngrams_by_piece(tokens, starts, n, vocab_size):
        bound += np.bincount(_hash_bucket(numbers), minlength=len(bound))
    candidates, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for numbers in _ngrams_by_piece(tokens, starts, n, vocab_size):
        new, new_counts = np.unique(numbers[bound[_hash_bucket(numbers)] > max_count], return_counts=True)
        candidates, index = np.unique(np.concatenate([candidates, new]), return_inverse=True)
        counts = np.bincount(index, np.concatenate([counts, new_counts]), len(candidates)).astype(np.int64)
    return candidates[counts > max_count]


def _ngrams_by_piece(
    tokens: Integer[np.ndarray, " S"], starts: Int[np.ndarray, " D"], n: int, vocab_size: int
) -> Iterator[Int[np.ndarray, " N"]]:
    """Yield the numbers of all n-grams within documents, piece by piece."""
    for first in range(0, len(tokens), TOKENS_PER_PIECE):
        numbers = ngram_ids(np.asarray(tokens[first : first + TOKENS_PER_PIECE + n - 1]), n, vocab_size)
        low, high = np.searchsorted(starts, [first, first + TOKENS_PER_PIECE + n])
        crossing = np.asarray(starts[low:high])[:, None] - np.arange(1, n) - first
        within = np.ones(len(numbers), bool)
        within[crossing[(crossing >= 0) & (crossing < len(within))]] = False
        yield numbers[within]


def _hash_bucket(numbers: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    return (splitmix64(numbers.astype(np.uint64)) >> np.uint64(64 - HASH_BITS)).astype(np.int64)


def _is_member(numbers: Int[np.ndarray, "..."], sorted_ids: Int[np.ndarray, " F"]) -> Bool[np.ndarray, "..."]:
    if not len(sorted_ids):
        return np.zeros(numbers.shape, bool)
    return sorted_ids[np.minimum(np.searchsorted(sorted_ids, numbers), len(sorted_ids) - 1)] == numbers
