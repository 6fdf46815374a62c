"""Pass-key and multi-key retrieval: facts hidden among other words, asked for at the end.

One fact is the pass-key task of Mohtashami & Jaggi 2023 (arXiv 2305.16300, section 4.3), several are the multi-key
needles of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3.1), both by words instead of text.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError
from recallax.tasks.base import Split, Task, stream
from recallax.tasks.distinct import distinct
from recallax.types import Batch, whole_rows


@dataclass(frozen=True, kw_only=True)
class KeyRetrieval(Task):
    """Recall the word that a name was given, wherever that happened.

    A row of L tokens is a haystack of L - 2 Q uniform words, in which K facts `mark name word` stand at uniform places
    without overlap, and Q questions `ask name`, which ask for every fact `asked` times in random order (once in valid
    and test). The target is the name's word, at the name in the question; answers never stand in the row. Names are
    distinct, words are words of the haystack. The weights of a row sum to 1.
    """

    words: int = 64
    names: int = 32
    train: tuple[tuple[int, int], ...] = ((64, 4), (256, 8))
    """(length, facts) of train batches, drawn evenly: what short rows teach soon, long ones teach late."""
    asked: int = 4
    """Times that a train row asks for each fact: more of them are learned from sooner."""
    test: tuple[tuple[int, int], ...] = ((256, 1), (256, 8), (1024, 1), (1024, 8), (4096, 1), (4096, 8))
    """(length, facts) of valid and test, taken in turn."""

    def __post_init__(self) -> None:
        if not self.train or not self.test:
            raise ConfigError("KeyRetrieval.train and KeyRetrieval.test must each hold at least one (length, facts)")
        if self.words < 2:
            raise ConfigError(f"KeyRetrieval.words is {self.words}; it must be at least 2")
        if self.asked < 1:
            raise ConfigError(f"KeyRetrieval.asked is {self.asked}; it must be at least 1")
        rows = [*((*slice, self.asked) for slice in self.train), *((*slice, 1) for slice in self.test)]
        for length, keys, asked in rows:
            if not 1 <= keys <= self.names:
                raise ConfigError(f"a row has {keys} facts; there must be 1 to {self.names}, one per name")
            needed = (3 + 2 * asked) * keys
            if length < needed:
                raise ConfigError(
                    f"length {length} cannot hold {keys} facts and questions; it must be at least {needed}"
                )

    @property
    def vocab_size(self) -> int:
        return self.words + self.names + 2

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """Every (length, facts) that occurs in any split, ascending."""
        return tuple(sorted({*self.train, *self.test}))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"L{length}_K{keys}" for length, keys in self.slices)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({length for length, _ in self._slices(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        most = max(keys for n, keys in self._slices(split) if n == length)
        return most * self.asked if split == "train" else most

    def prefixes(self, split: Split, length: int) -> tuple[int, ...]:
        times = self.asked if split == "train" else 1
        return tuple(sorted({n - 2 * keys * times for n, keys in self._slices(split) if n == length}))

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = stream(seed, split, index, "keyret")
        slices = self._slices(split)
        length, keys = slices[rng.integers(len(slices)) if split == "train" else index % len(slices)]
        mark, ask = self.words + self.names, self.words + self.names + 1
        times = self.asked if split == "train" else 1
        haystack = length - 2 * keys * times
        names = self.words + distinct(rng, size, keys, self.names)
        words = rng.integers(self.words, size=(size, keys))
        # Sorted draws among the places that are left when each fact takes one are starts of facts that take three.
        starts = np.sort(distinct(rng, size, keys, haystack - 2 * keys), axis=1) + 2 * np.arange(keys)
        tokens = rng.integers(self.words, size=(size, length)).astype(np.int32)
        for offset, part in enumerate((np.full_like(names, mark), names, words)):
            np.put_along_axis(tokens, starts + offset, part.astype(np.int32), axis=1)
        order = rng.permuted(np.tile(np.arange(keys), (size, times)), axis=1)
        asked, answers = (np.take_along_axis(x, order, axis=1) for x in (names, words))
        tokens[:, haystack::2], tokens[:, haystack + 1 :: 2] = ask, asked
        targets, weights = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
        targets[:, haystack + 1 :: 2], weights[:, haystack + 1 :: 2] = answers, 1 / (keys * times)
        group = np.full((size, length), self.slices.index((length, keys)), np.int32)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, whole_rows(size, length, haystack))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The word behind the name behind the mark."""
        mark, answers = self.words + self.names, np.zeros_like(tokens)
        for row, answer in zip(tokens, answers, strict=True):
            facts = np.flatnonzero(row == mark)
            known = dict(zip(row[facts + 1].tolist(), row[facts + 2].tolist(), strict=True))
            for place in np.flatnonzero(row == mark + 1) + 1:
                answer[place] = known[int(row[place])]
        return answers

    def chance(self) -> float:
        """One of the K marked words at random, or any word where one is marked: the mean over the test slices."""
        return float(np.mean([1 / keys if keys > 1 else 1 / self.words for _, keys in self.test]))

    def _slices(self, split: Split) -> tuple[tuple[int, int], ...]:
        return self.train if split == "train" else self.test
