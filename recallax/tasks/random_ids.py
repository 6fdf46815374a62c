"""Repeats within rows, and draws without repeats: for many rows at once, and without touching the whole pool."""

import numpy as np
from jaxtyping import Int


def first_occurrence(ids: Int[np.ndarray, "B N"]) -> Int[np.ndarray, "B N"]:
    """For each entry the index of the first entry of its row that equals it (its own index where it is the first).

    One sort per row: O(N log N) whatever the range of the ids, which must be at least 0.
    """
    rows, count = ids.shape
    packed = np.sort(ids.astype(np.int64) * count + np.arange(count), axis=1)
    index = packed % count
    head = np.ones((rows, count), bool)
    head[:, 1:] = np.diff(packed // count, axis=1) != 0
    # Within a run of equal ids the indices ascend, so its head holds the first occurrence.
    start = np.maximum.accumulate(np.where(head, np.arange(count), 0), axis=1)
    first = np.empty_like(index)
    np.put_along_axis(first, index, np.take_along_axis(index, start, axis=1), axis=1)
    return first


def sample_without_replacement(
    rng: np.random.Generator, rows: int, count: int, population: int
) -> Int[np.ndarray, "B N"]:
    """[rows, count] integers of range(pool); each row is a uniform draw without replacement, in random order.

    Where `count` is small against `population`, repeats are drawn again until none is left. That is exact: the procedure
    treats all ids alike, so all ordered tuples of distinct ids are equally likely. Raises ValueError if count > pool.
    """
    if count > population:
        raise ValueError(
            f"cannot draw {count} distinct ids from {population}; ask for fewer, or enlarge the vocabulary"
        )
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
