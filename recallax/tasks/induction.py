"""Induction heads with one cue (Gu and Dao 2023, Mamba, section 4.1.2)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import Split, Task, batch_rng
from recallax.types import Batch, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Task):
    """Recall the token that followed a cue when the cue occurs again at the end.

    Rows are uniform tokens below `num_symbols`. The cue, id `num_symbols`, occurs at one uniform position 0..L - 3 and
    at the last position. The last position has the only target, the token after the first cue. Test rows are longer
    than train rows, with the same single token to remember.
    """

    num_symbols: int = 16
    """Number of token ids besides the cue."""
    length: int = 256
    """Length of the train rows in tokens."""
    test_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Lengths of the valid and test batches, which use them in turn; the paper has lengths up to 2^20."""

    def __post_init__(self) -> None:
        if not self.test_lengths or min(self.length, *self.test_lengths) < 3:
            raise ConfigError(
                f"InductionHeads.length is {self.length} and test_lengths {self.test_lengths}; there must be a test "
                "length and each must be at least 3 (cue, token, cue)"
            )
        require_at_least(2, "InductionHeads.", num_symbols=self.num_symbols)

    @property
    def vocab_size(self) -> int:
        return self.num_symbols + 1

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"L{n}" for n in self._all_lengths)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,) if split == "train" else tuple(sorted(set(self.test_lengths)))

    def max_targets(self, split: Split, length: int) -> int:
        return 1

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return (length - 1,)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "induct")
        length = self.length if split == "train" else self.test_lengths[index % len(self.test_lengths)]
        tokens = rng.integers(self.num_symbols, size=(size, length), dtype=np.int32)
        row, cue = np.arange(size), rng.integers(length - 2, size=size)
        tokens[row, cue] = tokens[:, -1] = self.num_symbols
        targets, weights = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
        targets[:, -1], weights[:, -1] = tokens[row, cue + 1], 1
        group = np.full((size, length), self._all_lengths.index(length), np.int32)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, unpacked_seq_info(size, length, length - 1))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the token after the first cue, at the last position."""
        answers = np.zeros_like(tokens)
        first = (tokens == self.num_symbols).argmax(axis=1)
        answers[:, -1] = tokens[np.arange(len(tokens)), first + 1]
        return answers

    def chance(self) -> float:
        """Simulate the accuracy of the row's most frequent token, which approaches 1 / num_symbols in long rows."""
        rng = batch_rng(0, "test", 0, "share")
        even = [1 / self.num_symbols] * self.num_symbols
        return float(np.mean([rng.multinomial(n - 2, even, 2000).max(axis=1) / (n - 2) for n in self.test_lengths]))

    @property
    def _all_lengths(self) -> tuple[int, ...]:
        return tuple(sorted({self.length, *self.test_lengths}))
