"""Pass-key and multi-key retrieval: facts among random words, with queries at the end.

One fact is the pass-key task of Mohtashami & Jaggi 2023 (arXiv 2305.16300, section 4.3). Several facts are the
multi-key needles of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.1). Both have word ids instead of text.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import Split, Task, batch_rng
from recallax.tasks.random_ids import sample_without_replacement
from recallax.types import Batch, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class KeyRetrieval(Task):
    """Recall the word that was assigned to a name anywhere in the context.

    A row of L tokens is a haystack of L - 2 Q uniform words with K facts `mark name word` at uniform positions without
    overlap, followed by Q queries `ask name`. Each fact is queried `queries_per_fact` times in random order (once in
    valid and test). The target is the name's word, at the name in the query; the row does not contain the answers. The
    names of a row are distinct; the words of facts are drawn as those of the haystack. The weights of a row sum to 1.
    """

    num_words: int = 64
    """Number of word ids."""
    num_names: int = 32
    """Number of name ids."""
    train_slices: tuple[tuple[int, int], ...] = ((64, 4), (256, 8))
    """(length, facts) of the train batches, drawn with equal probability; short rows are learned sooner."""
    queries_per_fact: int = 4
    """Number of queries per fact in a train row; more queries are learned in fewer steps."""
    test_slices: tuple[tuple[int, int], ...] = ((256, 1), (256, 8), (1024, 1), (1024, 8), (4096, 1), (4096, 8))
    """(length, facts) of the valid and test batches, which use them in turn."""

    def __post_init__(self) -> None:
        if not self.train_slices or not self.test_slices:
            raise ConfigError(
                "KeyRetrieval.train_slices and KeyRetrieval.test_slices must each have at least one (length, facts)"
            )
        require_at_least(2, "KeyRetrieval.", num_words=self.num_words)
        require_at_least(1, "KeyRetrieval.", queries_per_fact=self.queries_per_fact)
        rows = [
            *((*slice, self.queries_per_fact) for slice in self.train_slices),
            *((*slice, 1) for slice in self.test_slices),
        ]
        for length, keys, queries in rows:
            if not 1 <= keys <= self.num_names:
                raise ConfigError(f"a row has {keys} facts; there must be 1 to {self.num_names}, one per name")
            needed = (3 + 2 * queries) * keys
            if length < needed:
                raise ConfigError(
                    f"length {length} is too short for {keys} facts and their queries; it must be at least {needed}"
                )

    @property
    def vocab_size(self) -> int:
        return self.num_words + self.num_names + 2

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """All pairs (length, facts) of all splits, ascending."""
        return tuple(sorted({*self.train_slices, *self.test_slices}))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"L{length}_K{keys}" for length, keys in self.slices)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({length for length, _ in self._slices(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        most = max(keys for n, keys in self._slices(split) if n == length)
        return most * self.queries_per_fact if split == "train" else most

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        times = self.queries_per_fact if split == "train" else 1
        return tuple(sorted({n - 2 * keys * times for n, keys in self._slices(split) if n == length}))

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "keyret")
        slices = self._slices(split)
        length, keys = slices[rng.integers(len(slices)) if split == "train" else index % len(slices)]
        mark, ask = self.num_words + self.num_names, self.num_words + self.num_names + 1
        times = self.queries_per_fact if split == "train" else 1
        haystack = length - 2 * keys * times
        names = self.num_words + sample_without_replacement(rng, size, keys, self.num_names)
        words = rng.integers(self.num_words, size=(size, keys))
        # Sorted draws from a haystack with one position per fact; 2 more per earlier fact give facts of 3 tokens.
        starts = np.sort(sample_without_replacement(rng, size, keys, haystack - 2 * keys), axis=1) + 2 * np.arange(keys)
        tokens = rng.integers(self.num_words, size=(size, length)).astype(np.int32)
        for offset, part in enumerate((np.full_like(names, mark), names, words)):
            np.put_along_axis(tokens, starts + offset, part.astype(np.int32), axis=1)
        order = rng.permuted(np.tile(np.arange(keys), (size, times)), axis=1)
        queried, answers = (np.take_along_axis(x, order, axis=1) for x in (names, words))
        tokens[:, haystack::2], tokens[:, haystack + 1 :: 2] = ask, queried
        targets, weights = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
        targets[:, haystack + 1 :: 2], weights[:, haystack + 1 :: 2] = answers, 1 / (keys * times)
        group = np.full((size, length), self.slices.index((length, keys)), np.int32)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, unpacked_seq_info(size, length, haystack))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the word that follows the mark and the queried name."""
        mark, answers = self.num_words + self.num_names, np.zeros_like(tokens)
        for row, answer in zip(tokens, answers, strict=True):
            facts = np.flatnonzero(row == mark)
            known = dict(zip(row[facts + 1].tolist(), row[facts + 2].tolist(), strict=True))
            for t in np.flatnonzero(row == mark + 1) + 1:
                answer[t] = known[int(row[t])]
        return answers

    def chance(self) -> float:
        """Compute the mean over the test slices of 1 / K, or of 1 / num_words for a single fact."""
        return float(np.mean([1 / keys if keys > 1 else 1 / self.num_words for _, keys in self.test_slices]))

    def _slices(self, split: Split) -> tuple[tuple[int, int], ...]:
        return self.train_slices if split == "train" else self.test_slices
