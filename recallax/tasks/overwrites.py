"""Associative recall with overwrites among noise: keys are written repeatedly, and the answer is the last value."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import Config, ConfigError, require_at_least
from recallax.tasks.base import Split, Task, batch_rng
from recallax.tasks.random_ids import sample_without_replacement
from recallax.types import Batch, unpacked_seq_info

WRITE_COUNT_BUCKETS = ("once", "twice", "more")
"""Groups of queries by the number of writes of their key."""


@dataclass(frozen=True, kw_only=True)
class OverwriteSlice(Config):
    """One slice of a mixture: rows of one length, number of keys and number of writes."""

    length: int
    """Row length in tokens."""
    num_keys: int
    """Keys of a row."""
    num_writes: int
    """Writes of a row, to all keys together."""
    num_examples: int = 1
    """Relative weight of the slice among the train batches; without effect in valid and test."""

    @property
    def buckets(self) -> tuple[str, ...]:
        """The `WRITE_COUNT_BUCKETS` that can occur; a key has at most num_writes - num_keys + 1 writes."""
        return WRITE_COUNT_BUCKETS[: self.num_writes - self.num_keys + 1]


@dataclass(frozen=True, kw_only=True)
class OverwriteRecall(Task):
    """Recall the last value that was written to each key.

    A row is a context followed by one slot `key noise` for each of its K keys, in random order. The context has W
    writes `key value` and noise tokens, in random order. Each key is written at least once, and the other W - K writes
    are to random keys. The answer is the value of the last write. The target at a query is its value, at the query's
    position.

    Of the V - `noise_vocab_size` ids below the noise, the lower half are keys and the rest values. The keys of a row
    are distinct, and so are its K answers. A write always changes the value of its key. Noise is uniform over the
    `noise_vocab_size` highest ids. The weights of a row sum to 1.

    The task is MQAR (Arora et al. 2024, Zoology, section 4) with overwrites and noise, which a memory must forget
    (Titans, arXiv 2501.00663, section 3.1). The default sizes are not published. `length_extrapolation` keeps the
    density of writes in longer rows, so the number of answers to remember stays the same and the number of writes to
    forget grows.
    """

    vocab_size: int = 8192
    """Number of ids, noise included."""
    noise_vocab_size: int = 2048
    """Number of noise ids, which are the highest ones."""
    mixture: tuple[OverwriteSlice, ...] = (OverwriteSlice(length=512, num_keys=16, num_writes=64),)
    """Slices of the train split."""
    test_mixture: tuple[OverwriteSlice, ...] = tuple(
        OverwriteSlice(length=512 * n, num_keys=16, num_writes=64 * n) for n in (1, 2, 4)
    )
    """Slices of the valid and test splits."""

    def __post_init__(self) -> None:
        if not self.mixture or not self.test_mixture:
            raise ConfigError(
                "OverwriteRecall.mixture and OverwriteRecall.test_mixture must each have at least one slice"
            )
        require_at_least(1, "OverwriteRecall.", noise_vocab_size=self.noise_vocab_size)
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
        """Make a task that is trained at one length and tested at several, with equal density of writes.

        Args:
            length: Length of the train rows in tokens.
            num_keys: Keys of a row, in every split.
            num_writes: Writes of a train row.
            length_factors: Length and writes of each test slice, as multiples of the train slice's.
            vocab_size: Number of token ids.
            noise_vocab_size: Number of noise ids among them.

        Returns:
            The task.
        """
        train = OverwriteSlice(length=length, num_keys=num_keys, num_writes=num_writes)
        test = tuple(
            OverwriteSlice(length=n * length, num_keys=num_keys, num_writes=n * num_writes) for n in length_factors
        )
        return cls(vocab_size=vocab_size, noise_vocab_size=noise_vocab_size, mixture=(train,), test_mixture=test)

    @property
    def slices(self) -> tuple[tuple[int, int, int], ...]:
        """All (length, num_keys, num_writes) of all splits, ascending."""
        return tuple(sorted({(s.length, s.num_keys, s.num_writes) for s in (*self.mixture, *self.test_mixture)}))

    @property
    def groups(self) -> tuple[str, ...]:
        """The slices, each divided by the number of writes of the queried key."""
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
        num_values = self._first_noise - self._num_keys
        answers = sample_without_replacement(rng, size, part.num_keys, num_values)
        values = self._num_keys + _sample_write_values(rng, written, answers, num_values)

        tokens = self._first_noise + rng.integers(self.noise_vocab_size, size=(size, length))
        at = _sample_write_positions(rng, size, part.num_writes, context - 2 * part.num_writes)
        np.put_along_axis(tokens, at, np.take_along_axis(keys, written, axis=1), axis=1)
        np.put_along_axis(tokens, at + 1, values, axis=1)
        queried = sample_without_replacement(rng, size, part.num_keys, part.num_keys)  # a permutation of the keys
        query = np.broadcast_to(context + 2 * np.arange(part.num_keys), queried.shape)
        np.put_along_axis(tokens, query, np.take_along_axis(keys, queried, axis=1), axis=1)

        count = np.zeros((size, part.num_keys), np.int64)
        np.add.at(count, (np.arange(size)[:, None], written), 1)
        bucket = np.minimum(count, len(WRITE_COUNT_BUCKETS)) - 1 + self.groups.index(_first_group_name(part))
        targets, weights, group = (np.zeros((size, length), t) for t in (np.int32, np.float32, np.int32))
        values_at_query = self._num_keys + np.take_along_axis(answers, queried, axis=1)
        np.put_along_axis(targets, query, values_at_query.astype(np.int32), axis=1)
        np.put_along_axis(weights, query, np.float32(1 / part.num_keys), axis=1)
        np.put_along_axis(group, query, np.take_along_axis(bucket, queried, axis=1).astype(np.int32), axis=1)
        seq = unpacked_seq_info(size, length, context)
        return Batch(tokens.astype(np.int32), targets, weights, np.zeros_like(group), group, seq)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the token after the last earlier occurrence of the key."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens.tolist(), answers, strict=True):
            value: dict[int, int] = {}
            for t, token in enumerate(row):
                answer[t] = value.get(token, 0)
                if t + 1 < len(row):
                    value[token] = row[t + 1]
        return answers

    def chance(self) -> float:
        """Compute the accuracy of a random answer of the row: the mean of 1 / num_keys over the test slices."""
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
            raise ConfigError(f"{part} must have num_keys >= 2, num_writes >= num_keys and num_examples >= 1")
        needed = 2 * part.num_writes + 2 * part.num_keys
        if needed > part.length:
            raise ConfigError(
                f"length {part.length} is too short for {part.num_writes} writes and {part.num_keys} queries; it must "
                f"be at least 2 W + 2 K = {needed}: increase length, or reduce num_writes or num_keys"
            )
        if part.num_keys > self._num_keys:
            raise ConfigError(
                f"vocab_size {self.vocab_size} with {self.noise_vocab_size} noise ids has {self._num_keys} keys but a "
                f"slice has {part.num_keys}; vocab_size must be at least {2 * part.num_keys + self.noise_vocab_size}"
            )


def _first_group_name(part: OverwriteSlice) -> str:
    return f"L{part.length}_K{part.num_keys}_W{part.num_writes}_{WRITE_COUNT_BUCKETS[0]}"


def _sample_write_keys(rng: np.random.Generator, size: int, part: OverwriteSlice) -> Int[np.ndarray, "B W"]:
    """Draw the key of each write: every key at least once, the others uniformly, in random order."""
    first_writes = np.broadcast_to(np.arange(part.num_keys), (size, part.num_keys))
    other_writes = rng.integers(part.num_keys, size=(size, part.num_writes - part.num_keys))
    return rng.permuted(np.concatenate((first_writes, other_writes), axis=1), axis=1)


def _sample_write_values(
    rng: np.random.Generator, written: Int[np.ndarray, "B W"], answers: Int[np.ndarray, "B K"], num_values: int
) -> Int[np.ndarray, "B W"]:
    """Draw the value of each write, below `num_values`, such that it differs from the key's next value.

    Backwards from a key's answer, each value is the next one plus a step of 1 to num_values - 1, modulo num_values.
    """
    step = rng.integers(1, num_values, size=written.shape)
    order = np.argsort(written, axis=1, kind="stable")  # by key, and by time within a key
    key = np.take_along_axis(written, order, axis=1)
    step_sum = np.cumsum(np.take_along_axis(step, order, axis=1)[:, ::-1], axis=1)[:, ::-1]
    # The sums include the steps of all following keys: subtract their value at the key's last write.
    last = np.diff(key, axis=1, append=answers.shape[1]) != 0
    following = np.maximum.accumulate(np.where(last, step_sum, 0)[:, ::-1], axis=1)[:, ::-1]
    values = np.empty_like(written)
    np.put_along_axis(
        values, order, (np.take_along_axis(answers, key, axis=1) + step_sum - following) % num_values, axis=1
    )
    return values


def _sample_write_positions(rng: np.random.Generator, size: int, writes: int, num_noise: int) -> Int[np.ndarray, "B W"]:
    """Draw the start of each write, with writes of two tokens and single noise tokens in random order."""
    is_write = rng.permuted(np.arange(writes + num_noise) < np.full((size, 1), writes), axis=1)
    item = np.nonzero(is_write)[1].reshape(size, writes)
    return item + np.arange(writes)
