"""Which tokens can be recalled from the context and hardly be known from training: Zoology's slice of perplexity.

A token is a recall token where it ends an n-gram that stands earlier in its document's part of the row, and that occurs
at most `frequent_ngrams` times in the training split. The publication takes bigrams, and 1250 times in 10 billion tokens of
the Pile. Source: Arora et al. 2023 (Zoology, arXiv 2312.04927), section 3.
"""

import numpy as np
from jaxtyping import Bool, Int, Integer

from recallax.tasks.text.permutation import splitmix64

HASH_BITS = 24
"""Bits of the hash by which n-grams are first counted: 128 MiB of counters, at any size of the corpus."""
TOKENS_PER_PIECE = 2**22
"""Tokens that are counted at a time."""


def ngram_ids(tokens: Integer[np.ndarray, "*rows N"], n: int, vocab_size: int) -> Int[np.ndarray, "*rows M"]:
    """A number for every run of n tokens, different for different runs; M = N - n + 1, and vocab**n is below 2**63."""
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
    """Where a token ends an n-gram of its segment that stood there before and is none of `frequent_ngrams` (sorted)."""
    found = np.zeros(tokens.shape, bool)
    if tokens.shape[1] <= n:
        return found
    numbers = ngram_ids(tokens, n, vocab_size)
    place = np.arange(numbers.shape[1])
    own = segment_ids[:, n - 1 :]
    numbers = np.where(
        own == segment_ids[:, : len(place)], numbers, -1 - place
    )  # what spans two segments equals nothing
    order = np.argsort(numbers, axis=1, kind="stable")
    run, segment = (np.take_along_axis(x, order, axis=1) for x in (numbers, own))
    # Occurrences of one n-gram stand in a run, in the order of the row; segments are in one piece each.
    repeated = np.zeros(numbers.shape, bool)
    repeated[:, 1:] = (run[:, 1:] == run[:, :-1]) & (segment[:, 1:] == segment[:, :-1])
    np.put_along_axis(found[:, n - 1 :], order, repeated, axis=1)
    found[:, n - 1 :] &= ~_is_member(numbers, frequent_ngrams)
    return found


def frequent_ngrams(
    tokens: Integer[np.ndarray, " S"], starts: Int[np.ndarray, " D"], n: int, vocab_size: int, max_count: int
) -> Int[np.ndarray, " F"]:
    """The n-grams that occur within documents more than `max_count` times, sorted. `starts` says where documents begin.

    Two readings: the first counts by a hash, which bounds each n-gram's count from above; the second counts exactly
    what may be frequent. So memory does not grow with the number of different n-grams.
    """
    bound = np.zeros(2**HASH_BITS, np.int64)
    for numbers in _ngrams_by_piece(tokens, starts, n, vocab_size):
        bound += np.bincount(_hash_bucket(numbers), minlength=len(bound))
    candidates, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for numbers in _ngrams_by_piece(tokens, starts, n, vocab_size):
        more, times = np.unique(numbers[bound[_hash_bucket(numbers)] > max_count], return_counts=True)
        candidates, where = np.unique(np.concatenate([candidates, more]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times]), len(candidates)).astype(np.int64)
    return candidates[counts > max_count]


def _ngrams_by_piece(tokens: Integer[np.ndarray, " S"], starts: Int[np.ndarray, " D"], n: int, vocab_size: int):
    """All n-grams that lie within a document, piece by piece."""
    for first in range(0, len(tokens), TOKENS_PER_PIECE):
        numbers = ngram_ids(np.asarray(tokens[first : first + TOKENS_PER_PIECE + n - 1]), n, vocab_size)
        low, high = np.searchsorted(starts, [first, first + TOKENS_PER_PIECE + n])
        crossing = np.asarray(starts[low:high])[:, None] - np.arange(1, n) - first
        whole = np.ones(len(numbers), bool)
        whole[crossing[(crossing >= 0) & (crossing < len(whole))]] = False
        yield numbers[whole]


def _hash_bucket(numbers: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    return (splitmix64(numbers.astype(np.uint64)) >> np.uint64(64 - HASH_BITS)).astype(np.int64)


def _is_member(numbers: Int[np.ndarray, "..."], sorted_ids: Int[np.ndarray, " F"]) -> Bool[np.ndarray, "..."]:
    if not len(sorted_ids):
        return np.zeros(numbers.shape, bool)
    return sorted_ids[np.minimum(np.searchsorted(sorted_ids, numbers), len(sorted_ids) - 1)] == numbers
