"""Find the one token that two sets share (Arora et al. 2024, Just Read Twice, section 3)."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, suggest_name
from recallax.tasks.base import Split, Task, batch_rng
from recallax.tasks.random_ids import sample_without_replacement
from recallax.types import Batch, unpacked_seq_info

SetOrder = Literal["short_first", "long_first", "both"]
START_ID, SEPARATOR_ID, QUERY_ID = 1, 2, 3
"""Special ids: before the first set, between the sets, and after the second."""
NUM_SPECIAL_IDS = 4
"""Ids that are not set elements; id 0 is reserved for JRT's mask."""


@dataclass(frozen=True, kw_only=True)
class SetDisjointness(Task):
    """Find the common token of a short and a long set.

    A row is `[1] A [2] B [3]` with |A| + |B| + 3 tokens. Neither set repeats a token and they share exactly one, which
    is the target at `[3]`, the only labelled position. It is also the only token that occurs twice.

    A model that reads the row once must remember the first set. So the gap between the orders (the groups
    "short_first_..." and "long_first_...") measures the cost of causality; a model that reads twice has no gap.

    The release draws the sets from two halves of a random permutation and overwrites one element of B by one of A.
    That is the same distribution as here: |A| + |B| - 1 distinct ids, of which one belongs to both sets.
    """

    vocab_size: int = 2048
    """Number of ids; those from 4 are set elements."""
    set_sizes: tuple[tuple[int, int], ...] = ((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256))
    """(short, long) sizes of the train batches, drawn with equal probability and equal within a batch."""
    test_set_sizes: tuple[tuple[int, int], ...] = (
        *((1, 32), (4, 32), (4, 128), (16, 256), (4, 256)),
        *((16, 512), (4, 512), (8, 768), (16, 768), (4, 768)),
    )
    """(short, long) sizes of the valid and test batches, which use them in turn."""
    order: SetOrder = "both"
    """The set that comes first; "both" alternates from row to row."""

    def __post_init__(self) -> None:
        if self.order not in get_args(SetOrder):
            raise ConfigError(
                f"SetDisjointness.order is {self.order!r}{suggest_name(self.order, list(get_args(SetOrder)))}"
            )
        if not self.set_sizes or not self.test_set_sizes:
            raise ConfigError("SetDisjointness.set_sizes and test_set_sizes must each have at least one (short, long)")
        for short, long in (*self.set_sizes, *self.test_set_sizes):
            if not 1 <= short <= long:
                raise ConfigError(
                    f"set sizes are ({short}, {long}); they must be (short, long) with 1 <= short <= long"
                )
            if short + long - 1 > self.vocab_size - NUM_SPECIAL_IDS:
                raise ConfigError(
                    f"vocab_size {self.vocab_size} is too small for sets of {short} and {long}; "
                    f"it must be at least {short + long - 1 + NUM_SPECIAL_IDS}"
                )

    @property
    def groups(self) -> tuple[str, ...]:
        orders = ("short_first", "long_first") if self.order == "both" else (self.order,)
        return tuple(f"{order}_{short}_{long}" for order in orders for short, long in self._all_set_sizes)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({short + long + 3 for short, long in self._set_sizes_of_split(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        return 1

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return (length - 1,)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "setdis")
        pairs = self._set_sizes_of_split(split)
        short, long = pairs[int(rng.integers(len(pairs))) if split == "train" else index % len(pairs)]
        ids = NUM_SPECIAL_IDS + sample_without_replacement(
            rng, size, short + long - 1, self.vocab_size - NUM_SPECIAL_IDS
        )
        # The ids are in random order, so the last of the short set can be the first of the long one;
        # then each set is permuted separately.
        small = rng.permuted(ids[:, :short], axis=1)
        large = rng.permuted(ids[:, short - 1 :], axis=1)
        swapped = self._is_long_first(index // len(pairs), size)

        length = short + long + 3
        tokens = np.empty((size, length), np.int32)
        tokens[:, 0], tokens[:, -1] = START_ID, QUERY_ID
        for first, second, rows in ((small, large, ~swapped), (large, small, swapped)):
            cut = 1 + first.shape[1]
            tokens[rows, 1:cut], tokens[rows, cut], tokens[rows, cut + 1 : -1] = first[rows], SEPARATOR_ID, second[rows]
        targets, weights = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
        targets[:, -1], weights[:, -1] = ids[:, short - 1], 1
        group = np.full((size, length), self._all_set_sizes.index((short, long)), np.int32)
        if self.order == "both":
            group[swapped] += len(self._all_set_sizes)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, unpacked_seq_info(size, length, length - 1))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the intersection of the sets before and after the separator, at the last position."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens.tolist(), answers, strict=True):
            cut = row.index(SEPARATOR_ID)
            (answer[-1],) = set(row[1:cut]) & set(row[cut + 1 : -1])
        return answers

    def chance(self) -> float:
        """Compute the accuracy of a random token of the short set: the mean of 1 / short over the test sizes."""
        return float(np.mean([1 / short for short, _ in self.test_set_sizes]))

    @property
    def _all_set_sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted({*self.set_sizes, *self.test_set_sizes}))

    def _set_sizes_of_split(self, split: Split) -> tuple[tuple[int, int], ...]:
        return self.set_sizes if split == "train" else self.test_set_sizes

    def _is_long_first(self, cycle: int, size: int) -> np.ndarray:
        if self.order != "both":
            return np.full(size, self.order == "long_first")
        # Each cycle over the sizes starts with the other order, so both are equally frequent for odd batch sizes too.
        return (np.arange(size) + cycle) % 2 == 1
