"""Associative recall with overwrites among noise: keys are written again and again, and the last value counts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import Config, ConfigError
from recallax.tasks.base import Split, Task, batch_rng
from recallax.tasks.random_ids import sample_without_replacement
from recallax.types import Batch, unpacked_seq_info

WRITE_COUNT_BUCKETS = ("once", "twice", "more")
"""How often an asked key was written; metrics are sliced by it."""


@dataclass(frozen=True, kw_only=True)
class OverwriteSlice(Config):
    """One slice of a mixture: rows of `length` tokens in which `num_keys` keys are written `num_writes` times in all."""

    length: int
    num_keys: int
    num_writes: int
    num_examples: int = 1
    """Relative weight of the slice among the train batches; without effect in valid and test."""

    @property
    def buckets(self) -> tuple[str, ...]:
        """Those of `WRITE_COUNT_BUCKETS` that can occur: no key is written more often than writes - keys + 1 times."""
        return WRITE_COUNT_BUCKETS[: self.num_writes - self.num_keys + 1]


@dataclass(frozen=True, kw_only=True)
class OverwriteRecall(Task):
    """Recall the value that each key was bound to last.

    A row is a context and then one slot `key noise` for each of its K keys, in random order. The context holds W
    writes `key value` and noise tokens, in random order: each key is written once, and the other W - K writes fall on
    keys at random, so a key may be written many times and the latest value is the answer. The target at a query is its
    value, at the query's own position.

    Of the V - `noise_vocab_size` ids below the noise, the lower half are keys and the rest values; keys of a row are
    distinct, so are the K answers, and a write never repeats the value that its key holds. Noise is uniform over the
    `noise_vocab_size` highest ids. The weights of a row sum to 1.

    MQAR (Arora et al. 2024, Zoology, section 4) with the overwrites and the noise that a memory has to forget (Titans,
    arXiv 2501.00663, section 3.1, argues so); these sizes are no paper's. `length_extrapolation` keeps the density of writes over
    longer rows: what is to be held stays the same, and what is to be forgotten grows.
    """

    vocab_size: int = 8192
    noise_vocab_size: int = 2048
    """How many of the ids are noise, the highest ones."""
    mixture: tuple[OverwriteSlice, ...] = (OverwriteSlice(length=512, num_keys=16, num_writes=64),)
    test_mixture: tuple[OverwriteSlice, ...] = tuple(
        OverwriteSlice(length=512 * n, num_keys=16, num_writes=64 * n) for n in (1, 2, 4)
    )
    """Slices of the valid and test splits."""

    def __post_init__(self) -> None:
        if not self.mixture or not self.test_mixture:
            raise ConfigError("OverwriteRecall.mixture and OverwriteRecall.test_mixture must each hold a slice")
        if self.noise_vocab_size < 1:
            raise ConfigError(f"OverwriteRecall.noise_vocab_size is {self.noise_vocab_size}; it must be at least 1")
        for part in (*self.mixture, *self.test_mixture):
            self._check_slice(part)

    @classmethod
    def length_extrapolation(
        cls,
        *,
        length: int,
        num_keys: int,
        num_writes: int,
        length_factors: tuple[int, ...] = (1, 2, 4),
        vocab_size: int = 8192,
        noise_vocab_size: int = 2048,
    ) -> "OverwriteRecall":
        """One train slice, and test slices that are `length_factors` as long with as many times its writes (8 is an option)."""
        train = OverwriteSlice(length=length, num_keys=num_keys, num_writes=num_writes)
        test = tuple(
            OverwriteSlice(length=n * length, num_keys=num_keys, num_writes=n * num_writes) for n in length_factors
        )
        return cls(vocab_size=vocab_size, noise_vocab_size=noise_vocab_size, mixture=(train,), test_mixture=test)

    @property
    def slices(self) -> tuple[tuple[int, int, int], ...]:
        """Every (length, keys, writes) that occurs in any split, ascending."""
        return tuple(sorted({(s.length, s.num_keys, s.num_writes) for s in (*self.mixture, *self.test_mixture)}))

    @property
    def groups(self) -> tuple[str, ...]:
        """Per slice how often the asked key was written."""
        parts = (OverwriteSlice(length=n, num_keys=k, num_writes=w) for n, k, w in self.slices)
        return tuple(f"L{s.length}_K{s.num_keys}_W{s.num_writes}_{bucket}" for s in parts for bucket in s.buckets)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({s.length for s in self._mixture(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        keys = [s.num_keys for s in self._mixture(split) if s.length == length]
        if not keys:
            raise ValueError(f"length {length} does not occur in {split}; its lengths are {self.lengths(split)}")
        return max(keys)

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return tuple(sorted({length - 2 * s.num_keys for s in self._mixture(split) if s.length == length}))

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "ovwrit")
        part = self._choose_slice(rng, split, index)
        length, context = part.length, part.length - 2 * part.num_keys
        keys = sample_without_replacement(rng, size, part.num_keys, self._num_keys)
        written = _sample_write_keys(rng, size, part)
        pool = self._first_noise - self._num_keys
        answers = sample_without_replacement(rng, size, part.num_keys, pool)
        values = self._num_keys + _sample_write_values(rng, written, answers, pool)

        tokens = self._first_noise + rng.integers(self.noise_vocab_size, size=(size, length))
        at = _sample_write_positions(rng, size, part.num_writes, context - 2 * part.num_writes)
        np.put_along_axis(tokens, at, np.take_along_axis(keys, written, axis=1), axis=1)
        np.put_along_axis(tokens, at + 1, values, axis=1)
        asked = sample_without_replacement(
            rng, size, part.num_keys, part.num_keys
        )  # a permutation: which key each slot asks for
        query = np.broadcast_to(context + 2 * np.arange(part.num_keys), asked.shape)
        np.put_along_axis(tokens, query, np.take_along_axis(keys, asked, axis=1), axis=1)

        count = np.zeros((size, part.num_keys), np.int64)
        np.add.at(count, (np.arange(size)[:, None], written), 1)
        bucket = np.minimum(count, len(WRITE_COUNT_BUCKETS)) - 1 + self.groups.index(_first_group_name(part))
        targets, weights, group = (np.zeros((size, length), t) for t in (np.int32, np.float32, np.int32))
        found = self._num_keys + np.take_along_axis(answers, asked, axis=1)
        np.put_along_axis(targets, query, found.astype(np.int32), axis=1)
        np.put_along_axis(weights, query, np.float32(1 / part.num_keys), axis=1)
        np.put_along_axis(group, query, np.take_along_axis(bucket, asked, axis=1).astype(np.int32), axis=1)
        seq = unpacked_seq_info(size, length, context)
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
        return float(np.mean([1 / s.num_keys for s in self.test_mixture]))

    @property
    def _first_noise(self) -> int:
        return self.vocab_size - self.noise_vocab_size

    @property
    def _num_keys(self) -> int:
        return self._first_noise // 2

    def _mixture(self, split: Split) -> tuple[OverwriteSlice, ...]:
        return self.mixture if split == "train" else self.test_mixture

    def _choose_slice(self, rng: np.random.Generator, split: Split, index: int) -> OverwriteSlice:
        if split != "train":
            return self.test_mixture[index % len(self.test_mixture)]
        ends = np.cumsum([s.num_examples for s in self.mixture])
        return self.mixture[int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))]

    def _check_slice(self, part: OverwriteSlice) -> None:
        if part.num_keys < 2 or part.num_writes < part.num_keys or part.num_examples < 1:
            raise ConfigError(f"{part} must have keys >= 2, writes >= keys (each is written once) and rows >= 1")
        needed = 2 * part.num_writes + 2 * part.num_keys
        if needed > part.length:
            raise ConfigError(
                f"length {part.length} cannot hold {part.num_writes} writes and {part.num_keys} queries; 2 W + 2 K = {needed} "
                "must be at most the length: lengthen it or lower writes or keys"
            )
        if part.num_keys > self._num_keys:
            raise ConfigError(
                f"vocab_size {self.vocab_size} with {self.noise_vocab_size} ids of noise has {self._num_keys} keys but a "
                f"slice asks for {part.num_keys}; vocab_size must be at least {2 * part.num_keys + self.noise_vocab_size}"
            )


def _first_group_name(part: OverwriteSlice) -> str:
    return f"L{part.length}_K{part.num_keys}_W{part.num_writes}_{WRITE_COUNT_BUCKETS[0]}"


def _sample_write_keys(rng: np.random.Generator, size: int, part: OverwriteSlice) -> Int[np.ndarray, "B W"]:
    """Which of the K keys each write is of: every key once, the other writes at random, in random order."""
    once = np.broadcast_to(np.arange(part.num_keys), (size, part.num_keys))
    again = rng.integers(part.num_keys, size=(size, part.num_writes - part.num_keys))
    return rng.permuted(np.concatenate((once, again), axis=1), axis=1)


def _sample_write_values(
    rng: np.random.Generator, written: Int[np.ndarray, "B W"], answers: Int[np.ndarray, "B K"], num_values: int
) -> Int[np.ndarray, "B W"]:
    """What each write binds, below `num_values`: from a key's answer backwards, each a step round a circle, never a turn."""
    step = rng.integers(1, num_values, size=written.shape)
    order = np.argsort(written, axis=1, kind="stable")  # by key, and by time within a key
    which = np.take_along_axis(written, order, axis=1)
    later = np.cumsum(np.take_along_axis(step, order, axis=1)[:, ::-1], axis=1)[:, ::-1]
    # These sums run on over the keys that follow: take off what they are at the key's own last write.
    last = np.diff(which, axis=1, append=answers.shape[1]) != 0
    beyond = np.maximum.accumulate(np.where(last, later, 0)[:, ::-1], axis=1)[:, ::-1]
    values = np.empty_like(written)
    np.put_along_axis(values, order, (np.take_along_axis(answers, which, axis=1) + later - beyond) % num_values, axis=1)
    return values


def _sample_write_positions(rng: np.random.Generator, size: int, writes: int, num_noise: int) -> Int[np.ndarray, "B W"]:
    """Where each write begins if writes of two tokens and single noise tokens follow one another in random order."""
    wide = rng.permuted(np.arange(writes + num_noise) < np.full((size, 1), writes), axis=1)
    item = np.nonzero(wide)[1].reshape(size, writes)
    return item + np.arange(writes)
