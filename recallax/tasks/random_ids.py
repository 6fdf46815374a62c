"""Sampling without replacement and the detection of repeats, vectorized over rows."""

import numpy as np
from jaxtyping import Int


def first_occurrence(ids: Int[np.ndarray, "B N"]) -> Int[np.ndarray, "B N"]:
    """Find the first occurrence of each entry's value in its row.

    It sorts each row, so it takes O(N log N) time for any range of ids.

    Args:
        ids: Integers of at least 0.

    Returns:
        For each entry the index of the first equal entry of its row; its own index if it is the first.
    """
    rows, count = ids.shape
    packed = np.sort(ids.astype(np.int64) * count + np.arange(count), axis=1)
    index = packed % count
    head = np.ones((rows, count), bool)
    head[:, 1:] = np.diff(packed // count, axis=1) != 0
    # Within a run of equal ids the indices ascend, so its head is the first occurrence.
    start = np.maximum.accumulate(np.where(head, np.arange(count), 0), axis=1)
    first = np.empty_like(index)
    np.put_along_axis(first, index, np.take_along_axis(index, start, axis=1), axis=1)
    return first


def sample_without_replacement(
    rng: np.random.Generator, rows: int, count: int, population: int
) -> Int[np.ndarray, "B N"]:
    """Draw uniformly without replacement, independently per row and in random order.

    If `count` is small compared with `population`, repeats are redrawn until none is left. This is exact: the procedure
    treats all ids alike, so all ordered tuples of distinct ids are equally likely.

    Args:
        rng: Random generator.
        rows: Number of rows B.
        count: Draws per row N.
        population: Draws are from `range(population)`.

    Returns:
        The drawn integers.

    Raises:
        ValueError: `count` exceeds `population`.
    """
    if count > population:
        raise ValueError(f"cannot draw {count} distinct ids from {population}; draw fewer, or enlarge the vocabulary")
    if 4 * count > population:
        return rng.permuted(np.tile(np.arange(population), (rows, 1)), axis=1)[:, :count]
    drawn = rng.integers(population, size=(rows, count))
    pending = np.arange(rows)
    while pending.size:
        part = drawn[pending]
        repeat = first_occurrence(part) != np.arange(count)
        part[repeat] = rng.integers(population, size=int(repeat.sum()))
        drawn[pending] = part
        pending = pending[repeat.any(axis=1)]
    return drawn
