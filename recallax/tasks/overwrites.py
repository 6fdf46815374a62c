"""Associative recall with overwrites among noise: keys are written again and again, and the last value counts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import Config, ConfigError
from recallax.tasks.base import Split, Task, stream
from recallax.tasks.distinct import distinct
from recallax.types import Batch, whole_rows

BUCKETS = ("once", "twice", "more")
"""How often an asked key was written; metrics are sliced by it."""


@dataclass(frozen=True, kw_only=True)
class Writes(Config):
    """One slice of a mixture: rows of `length` tokens in which `keys` keys are written `writes` times in all."""

    length: int
    keys: int
    writes: int
    rows: int = 1
    """Relative weight of the slice among the train batches; without effect in valid and test."""

    @property
    def buckets(self) -> tuple[str, ...]:
        """Those of `BUCKETS` that can occur: no key is written more often than writes - keys + 1 times."""
        return BUCKETS[: self.writes - self.keys + 1]


@dataclass(frozen=True, kw_only=True)
class OverwriteRecall(Task):
    """Recall the value that each key was bound to last.

    A row is a context and then one slot `key noise` for each of its K keys, in random order. The context holds W
    writes `key value` and noise tokens, in random order: each key is written once, and the other W - K writes fall on
    keys at random, so a key may be written many times and the latest value is the answer. The target at a query is its
    value, at the query's own position.

    Of the V - `noise_vocab` ids below the noise, the lower half are keys and the rest values; keys of a row are
    distinct, so are the K answers, and a write never repeats the value that its key holds. Noise is uniform over the
    `noise_vocab` highest ids. The weights of a row sum to 1.

    MQAR (Arora et al. 2024, Zoology, section 4) with the overwrites and the noise that a memory has to forget (Titans,
    arXiv 2501.00663, section 3.1, argues so); these sizes are no paper's. `stretched` keeps the density of writes over
    longer rows: what is to be held stays the same, and what is to be forgotten grows.
    """

    vocab_size: int = 8192
    noise_vocab: int = 2048
    """How many of the ids are noise, the highest ones."""
    mixture: tuple[Writes, ...] = (Writes(length=512, keys=16, writes=64),)
    test_mixture: tuple[Writes, ...] = tuple(Writes(length=512 * n, keys=16, writes=64 * n) for n in (1, 2, 4))
    """Slices of the valid and test splits."""

    def __post_init__(self) -> None:
        if not self.mixture or not self.test_mixture:
            raise ConfigError("OverwriteRecall.mixture and OverwriteRecall.test_mixture must each hold a slice")
        if self.noise_vocab < 1:
            raise ConfigError(f"OverwriteRecall.noise_vocab is {self.noise_vocab}; it must be at least 1")
        for part in (*self.mixture, *self.test_mixture):
            self._check(part)

    @classmethod
    def stretched(
        cls,
        *,
        length: int,
        keys: int,
        writes: int,
        times: tuple[int, ...] = (1, 2, 4),
        vocab_size: int = 8192,
        noise_vocab: int = 2048,
    ) -> "OverwriteRecall":
        """One train slice, and test slices that are `times` as long with as many times its writes (8 is an option)."""
        train = Writes(length=length, keys=keys, writes=writes)
        test = tuple(Writes(length=n * length, keys=keys, writes=n * writes) for n in times)
        return cls(vocab_size=vocab_size, noise_vocab=noise_vocab, mixture=(train,), test_mixture=test)

    @property
    def slices(self) -> tuple[tuple[int, int, int], ...]:
        """Every (length, keys, writes) that occurs in any split, ascending."""
        return tuple(sorted({(s.length, s.keys, s.writes) for s in (*self.mixture, *self.test_mixture)}))

    @property
    def groups(self) -> tuple[str, ...]:
        """Per slice how often the asked key was written."""
        parts = (Writes(length=n, keys=k, writes=w) for n, k, w in self.slices)
        return tuple(f"L{s.length}_K{s.keys}_W{s.writes}_{bucket}" for s in parts for bucket in s.buckets)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({s.length for s in self._mixture(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        keys = [s.keys for s in self._mixture(split) if s.length == length]
        if not keys:
            raise ValueError(f"length {length} does not occur in {split}; its lengths are {self.lengths(split)}")
        return max(keys)

    def prefixes(self, split: Split, length: int) -> tuple[int, ...]:
        return tuple(sorted({length - 2 * s.keys for s in self._mixture(split) if s.length == length}))

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = stream(seed, split, index, "ovwrit")
        part = self._slice(rng, split, index)
        length, context = part.length, part.length - 2 * part.keys
        keys = distinct(rng, size, part.keys, self._num_keys)
        written = _written(rng, size, part)
        pool = self._first_noise - self._num_keys
        answers = distinct(rng, size, part.keys, pool)
        values = self._num_keys + _values(rng, written, answers, pool)

        tokens = self._first_noise + rng.integers(self.noise_vocab, size=(size, length))
        at = _places(rng, size, part.writes, context - 2 * part.writes)
        np.put_along_axis(tokens, at, np.take_along_axis(keys, written, axis=1), axis=1)
        np.put_along_axis(tokens, at + 1, values, axis=1)
        asked = distinct(rng, size, part.keys, part.keys)  # a permutation: which key each slot asks for
        query = np.broadcast_to(context + 2 * np.arange(part.keys), asked.shape)
        np.put_along_axis(tokens, query, np.take_along_axis(keys, asked, axis=1), axis=1)

        count = np.zeros((size, part.keys), np.int64)
        np.add.at(count, (np.arange(size)[:, None], written), 1)
        bucket = np.minimum(count, len(BUCKETS)) - 1 + self.groups.index(_group(part))
        targets, weights, group = (np.zeros((size, length), t) for t in (np.int32, np.float32, np.int32))
        found = self._num_keys + np.take_along_axis(answers, asked, axis=1)
        np.put_along_axis(targets, query, found.astype(np.int32), axis=1)
        np.put_along_axis(weights, query, np.float32(1 / part.keys), axis=1)
        np.put_along_axis(group, query, np.take_along_axis(bucket, asked, axis=1).astype(np.int32), axis=1)
        seq = whole_rows(size, length, context)
        return Batch(tokens.astype(np.int32), targets, weights, np.zeros_like(group), group, seq)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The token behind the latest earlier occurrence: noise is never a key, and a key is asked once."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens.tolist(), answers, strict=True):
            value: dict[int, int] = {}
            for t, token in enumerate(row):
                answer[t] = value.get(token, 0)
                if t + 1 < len(row):
                    value[token] = row[t + 1]
        return answers

    def chance(self) -> float:
        """One of the row's K current values at random: the mean of 1/K over the test slices."""
        return float(np.mean([1 / s.keys for s in self.test_mixture]))

    @property
    def _first_noise(self) -> int:
        return self.vocab_size - self.noise_vocab

    @property
    def _num_keys(self) -> int:
        return self._first_noise // 2

    def _mixture(self, split: Split) -> tuple[Writes, ...]:
        return self.mixture if split == "train" else self.test_mixture

    def _slice(self, rng: np.random.Generator, split: Split, index: int) -> Writes:
        if split != "train":
            return self.test_mixture[index % len(self.test_mixture)]
        ends = np.cumsum([s.rows for s in self.mixture])
        return self.mixture[int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))]

    def _check(self, part: Writes) -> None:
        if part.keys < 2 or part.writes < part.keys or part.rows < 1:
            raise ConfigError(f"{part} must have keys >= 2, writes >= keys (each is written once) and rows >= 1")
        needed = 2 * part.writes + 2 * part.keys
        if needed > part.length:
            raise ConfigError(
                f"length {part.length} cannot hold {part.writes} writes and {part.keys} queries; 2 W + 2 K = {needed} "
                "must be at most the length: lengthen it or lower writes or keys"
            )
        if part.keys > self._num_keys:
            raise ConfigError(
                f"vocab_size {self.vocab_size} with {self.noise_vocab} ids of noise has {self._num_keys} keys but a "
                f"slice asks for {part.keys}; vocab_size must be at least {2 * part.keys + self.noise_vocab}"
            )


def _group(part: Writes) -> str:
    return f"L{part.length}_K{part.keys}_W{part.writes}_{BUCKETS[0]}"


def _written(rng: np.random.Generator, size: int, part: Writes) -> Int[np.ndarray, "B W"]:
    """Which of the K keys each write is of: every key once, the other writes at random, in random order."""
    once = np.broadcast_to(np.arange(part.keys), (size, part.keys))
    again = rng.integers(part.keys, size=(size, part.writes - part.keys))
    return rng.permuted(np.concatenate((once, again), axis=1), axis=1)


def _values(
    rng: np.random.Generator, written: Int[np.ndarray, "B W"], answers: Int[np.ndarray, "B K"], pool: int
) -> Int[np.ndarray, "B W"]:
    """What each write binds, below `pool`: from a key's answer backwards, each a step round a circle, never a turn."""
    step = rng.integers(1, pool, size=written.shape)
    order = np.argsort(written, axis=1, kind="stable")  # by key, and by time within a key
    which = np.take_along_axis(written, order, axis=1)
    later = np.cumsum(np.take_along_axis(step, order, axis=1)[:, ::-1], axis=1)[:, ::-1]
    # These sums run on over the keys that follow: take off what they are at the key's own last write.
    last = np.diff(which, axis=1, append=answers.shape[1]) != 0
    beyond = np.maximum.accumulate(np.where(last, later, 0)[:, ::-1], axis=1)[:, ::-1]
    values = np.empty_like(written)
    np.put_along_axis(values, order, (np.take_along_axis(answers, which, axis=1) + later - beyond) % pool, axis=1)
    return values


def _places(rng: np.random.Generator, size: int, writes: int, noise: int) -> Int[np.ndarray, "B W"]:
    """Where each write begins if writes of two tokens and single noise tokens follow one another in random order."""
    wide = rng.permuted(np.arange(writes + noise) < np.full((size, 1), writes), axis=1)
    item = np.nonzero(wide)[1].reshape(size, writes)
    return item + np.arange(writes)
