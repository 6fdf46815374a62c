"""Pass-key and multi-key retrieval: facts hidden among other words, asked for at the end.

One fact is the pass-key task of Mohtashami & Jaggi 2023 (arXiv 2305.16300, section 4.3), several are the multi-key
needles of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.1), both by words instead of text.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError
from recallax.tasks.base import Split, Task, batch_rng
from recallax.tasks.random_ids import sample_without_replacement
from recallax.types import Batch, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class KeyRetrieval(Task):
    """Recall the word that a name was given, wherever that happened.

    A row of L tokens is a haystack of L - 2 Q uniform words, in which K facts `mark name word` stand at uniform places
    without overlap, and Q questions `ask name`, which ask for every fact `queries_per_fact` times in random order (once in valid
    and test). The target is the name's word, at the name in the question; answers never stand in the row. Names are
    distinct, words are words of the haystack. The weights of a row sum to 1.
    """

    num_words: int = 64
    num_names: int = 32
    train_slices: tuple[tuple[int, int], ...] = ((64, 4), (256, 8))
    """(length, facts) of train batches, drawn evenly: what short rows teach soon, long ones teach late."""
    queries_per_fact: int = 4
    """Times that a train row asks for each fact: more of them are learned from sooner."""
    test_slices: tuple[tuple[int, int], ...] = ((256, 1), (256, 8), (1024, 1), (1024, 8), (4096, 1), (4096, 8))
    """(length, facts) of valid and test, taken in turn."""

    def __post_init__(self) -> None:
        if not self.train_slices or not self.test_slices:
            raise ConfigError("KeyRetrieval.train and KeyRetrieval.test must each hold at least one (length, facts)")
        if self.num_words < 2:
            raise ConfigError(f"KeyRetrieval.num_words is {self.num_words}; it must be at least 2")
        if self.queries_per_fact < 1:
            raise ConfigError(f"KeyRetrieval.queries_per_fact is {self.queries_per_fact}; it must be at least 1")
        rows = [
            *((*slice, self.queries_per_fact) for slice in self.train_slices),
            *((*slice, 1) for slice in self.test_slices),
        ]
        for length, keys, asked in rows:
            if not 1 <= keys <= self.num_names:
                raise ConfigError(f"a row has {keys} facts; there must be 1 to {self.num_names}, one per name")
            needed = (3 + 2 * asked) * keys
            if length < needed:
                raise ConfigError(
                    f"length {length} cannot hold {keys} facts and questions; it must be at least {needed}"
                )

    @property
    def vocab_size(self) -> int:
        return self.num_words + self.num_names + 2

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """Every (length, facts) that occurs in any split, ascending."""
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
        # Sorted draws among the places that are left when each fact takes one are starts of facts that take three.
        starts = np.sort(sample_without_replacement(rng, size, keys, haystack - 2 * keys), axis=1) + 2 * np.arange(keys)
        tokens = rng.integers(self.num_words, size=(size, length)).astype(np.int32)
        for offset, part in enumerate((np.full_like(names, mark), names, words)):
            np.put_along_axis(tokens, starts + offset, part.astype(np.int32), axis=1)
        order = rng.permuted(np.tile(np.arange(keys), (size, times)), axis=1)
        asked, answers = (np.take_along_axis(x, order, axis=1) for x in (names, words))
        tokens[:, haystack::2], tokens[:, haystack + 1 :: 2] = ask, asked
        targets, weights = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
        targets[:, haystack + 1 :: 2], weights[:, haystack + 1 :: 2] = answers, 1 / (keys * times)
        group = np.full((size, length), self.slices.index((length, keys)), np.int32)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, unpacked_seq_info(size, length, haystack))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The word behind the name behind the mark."""
        mark, answers = self.num_words + self.num_names, np.zeros_like(tokens)
        for row, answer in zip(tokens, answers, strict=True):
            facts = np.flatnonzero(row == mark)
            known = dict(zip(row[facts + 1].tolist(), row[facts + 2].tolist(), strict=True))
            for place in np.flatnonzero(row == mark + 1) + 1:
                answer[place] = known[int(row[place])]
        return answers

    def chance(self) -> float:
        """One of the K marked words at random, or any word where one is marked: the mean over the test slices."""
        return float(np.mean([1 / keys if keys > 1 else 1 / self.num_words for _, keys in self.test_slices]))

    def _slices(self, split: Split) -> tuple[tuple[int, int], ...]:
        return self.train_slices if split == "train" else self.test_slices
