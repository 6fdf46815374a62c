"""Copy a string (Jelassi et al. 2024, Repeat After Me, section 3)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import Split, Task, batch_rng, most_frequent_token_accuracy
from recallax.types import Batch, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """Copy a string of random letters: a row is `$ s | s .`, and the targets are the second half.

    s has independent uniform letters; `$`, `|` and `.` are the ids after the letters. From `|` on the targets are the
    letters of s and then `.`, n + 1 of them for |s| = n, and their weights sum to 1 in each row. Train strings have
    lengths uniform in `train_lengths`, mixed within a batch; a test batch has one length. The closing `.` is a target
    but never an input: the tokens after the second s are padding with its id.

    A row contains one string; the release packs several into 220 tokens.
    """

    alphabet_size: int = 26
    """Number of letters."""
    train_lengths: tuple[int, int] = (5, 20)
    """Lengths of the shortest and the longest train string."""
    test_lengths: tuple[int, ...] = (20, 40, 80, 160)
    """String lengths of the valid and test batches, which use them in turn."""

    def __post_init__(self) -> None:
        shortest, longest = self.train_lengths
        if not 1 <= shortest <= longest or not self.test_lengths or min(self.test_lengths) < 1:
            raise ConfigError(
                f"Copying.train_lengths is {self.train_lengths} and test_lengths {self.test_lengths}; they must be "
                "(shortest, longest) and a list, with lengths of at least 1"
            )
        require_at_least(2, "Copying.", alphabet_size=self.alphabet_size)

    @property
    def vocab_size(self) -> int:
        return self.alphabet_size + 3

    @property
    def groups(self) -> tuple[str, ...]:
        """Ranges of string lengths: "n20" has the strings of at most 20 letters that fit no smaller range."""
        return tuple(f"n{n}" for n in self._length_buckets)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({2 * n + 2 for n in self._max_string_lengths(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        return length // 2

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        longest = length // 2 - 1
        return tuple(n + 1 for n in range(self.train_lengths[0] if split == "train" else longest, longest + 1))

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "copy")
        longest = self._max_string_lengths(split)[index % len(self._max_string_lengths(split))]
        shortest = self.train_lengths[0] if split == "train" else longest
        n = rng.integers(shortest, longest + 1, size=(size, 1))
        letters = rng.integers(self.alphabet_size, size=(size, longest))
        length = 2 * longest + 2

        start, bar, stop = self.alphabet_size + np.arange(3)
        t = np.broadcast_to(np.arange(length), (size, length))
        second_half = (t > n + 1) & (t < 2 * n + 2)
        letter = np.take_along_axis(letters, np.clip(np.where(second_half, t - n - 2, t - 1), 0, longest - 1), axis=1)
        tokens = np.where((t <= n) | second_half, letter, stop)
        tokens[:, 0] = start
        np.put_along_axis(tokens, n + 1, bar, axis=1)

        labelled = (t >= n + 1) & (t < 2 * n + 2)
        targets = np.zeros((size, length), np.int32)
        targets[:, :-1], targets[:, -1] = tokens[:, 1:], stop
        weights = np.where(labelled, 1 / (n + 1), 0).astype(np.float32)
        group = np.broadcast_to(np.searchsorted(self._length_buckets, n), (size, length)).astype(np.int32)
        seq = unpacked_seq_info(size, length)._replace(segment_ids=(t < 2 * n + 2).astype(np.int32), prefix=t <= n)
        return Batch(tokens.astype(np.int32), targets * labelled, weights, np.zeros_like(group), group, seq)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the string between `$` and `|` and then `.`, from `|` on."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens.tolist(), answers, strict=True):
            n = row.index(self.alphabet_size + 1) - 1
            answer[n + 1 : 2 * n + 2] = [*row[1 : n + 1], self.alphabet_size + 2]
        return answers

    def chance(self) -> float:
        """Compute the accuracy of the most frequent letter of the string."""
        return most_frequent_token_accuracy(self, 0, self.alphabet_size - 1)

    @property
    def _length_buckets(self) -> tuple[int, ...]:
        return tuple(sorted({self.train_lengths[1], *self.test_lengths}))

    def _max_string_lengths(self, split: Split) -> tuple[int, ...]:
        return (self.train_lengths[1],) if split == "train" else self.test_lengths
