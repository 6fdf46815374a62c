"""Multi-query associative recall (Arora et al. 2024, Zoology, section 4; Based, figure 2)."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from recallax.config import Config, ConfigError, require_at_least, suggest_name
from recallax.tasks.base import Split, Task, batch_rng
from recallax.tasks.random_ids import sample_without_replacement
from recallax.types import Batch, unpacked_seq_info

Filler = Literal["disjoint", "zoology", "zero"]


@dataclass(frozen=True, kw_only=True)
class MixtureSlice(Config):
    """One slice of a mixture: rows of `length` tokens that hold `num_kv_pairs` key/value pairs."""

    length: int
    """Row length in tokens."""
    num_kv_pairs: int
    """Key/value pairs of a row."""
    num_examples: int = 1
    """Relative weight of the slice among the train batches; without effect in valid and test."""


ZOOLOGY_MIX = (
    MixtureSlice(length=64, num_kv_pairs=4, num_examples=100_000),
    MixtureSlice(length=128, num_kv_pairs=8, num_examples=20_000),
    MixtureSlice(length=256, num_kv_pairs=16, num_examples=20_000),
    MixtureSlice(length=256, num_kv_pairs=32, num_examples=20_000),
    MixtureSlice(length=256, num_kv_pairs=64, num_examples=20_000),
)
"""Train mixture of Based's figure 2 and of most later papers."""

ZOOLOGY_TEST = (
    MixtureSlice(length=64, num_kv_pairs=4),
    MixtureSlice(length=64, num_kv_pairs=8),
    MixtureSlice(length=64, num_kv_pairs=16),
    MixtureSlice(length=128, num_kv_pairs=32),
    MixtureSlice(length=256, num_kv_pairs=64),
    MixtureSlice(length=512, num_kv_pairs=128),
    MixtureSlice(length=1024, num_kv_pairs=256),
)
"""Test slices of `ZOOLOGY_MIX`; the last two are 2 and 4 times longer than its longest train slice."""


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Recall the value of each key from the key/value pairs at the start of the row.

    A row is `k_1 v_1 ... k_K v_K`, repeated `num_passes` times, followed by S = (L - 2 K num_passes) / 2 slots of two
    tokens. Keys are distinct ids of [1, V/2) and values distinct ids of [V/2, V). Key j is the first token of slot s_j,
    where s_1, ..., s_K are drawn in this order without replacement with p(s) ∝ s^(power_a - 1), s = 1..S. The other
    tokens of the slots are filler. The target at a query is its value, at the query's position, without a shift.

    The weights of a row sum to 1, so a weighted mean is the mean over rows of each row's accuracy, as published. All
    rows of a train batch are of one slice, drawn in proportion to `num_examples`; the published order from easy to hard
    within an epoch is not reproduced. Valid and test batches use the slices in turn, so a multiple of their number
    weights them equally.

    The published filler ("zoology") is uniform over all ids. So it may repeat a key of the row next to a random token,
    a false pair that is nearer than the true one. "disjoint" is uniform over all ids except the row's keys.
    """

    vocab_size: int = 8192
    mixture: tuple[MixtureSlice, ...] = ZOOLOGY_MIX
    """Slices of the train split."""
    test_mixture: tuple[MixtureSlice, ...] = ZOOLOGY_TEST
    """Slices of the valid and test splits."""
    power_a: float = 0.01
    """Exponent of the slot distribution: near 0 most queries follow the context closely (about 1/s), 1 is uniform."""
    filler: Filler = "disjoint"
    """Tokens at positions that are neither pair nor query; "zero" (id 0) is the setting of Zoology's figure 2."""
    num_passes: int = 1
    """Number of copies of the context before the queries; 2 equals JRT's repeated context."""

    def __post_init__(self) -> None:
        if not self.mixture or not self.test_mixture:
            raise ConfigError("MQAR.mixture and MQAR.test_mixture must each have at least one slice")
        if self.filler not in get_args(Filler):
            raise ConfigError(f"MQAR.filler is {self.filler!r}{suggest_name(self.filler, list(get_args(Filler)))}")
        if self.power_a <= 0:
            raise ConfigError(f"MQAR.power_a is {self.power_a}; it must be above 0 (1 is uniform)")
        require_at_least(1, "MQAR.", num_passes=self.num_passes)
        for mixture_slice in (*self.mixture, *self.test_mixture):
            self._check_slice(mixture_slice)

    @classmethod
    def single(
        cls,
        *,
        length: int,
        num_kv_pairs: int,
        test_slices: tuple[tuple[int, int], ...] = (),
        vocab_size: int = 8192,
        filler: Filler = "disjoint",
    ) -> "MQAR":
        """Make a task with a single train slice.

        Zoology's figure 2 has `filler="zero"` and (length, num_kv_pairs) = (64, 4), (128, 8), (256, 16) or (512, 64),
        with one model each.

        Args:
            length: Row length in tokens.
            num_kv_pairs: Key/value pairs of a row.
            test_slices: (length, num_kv_pairs) of the test slices; empty for the train slice.
            vocab_size: Number of token ids.
            filler: Tokens at positions that are neither pair nor query.

        Returns:
            The task.

        Examples:
            >>> task = MQAR.single(length=16, num_kv_pairs=2, vocab_size=32)
            >>> batch = task.batch(seed=0, split="test", index=0, size=1)
            >>> int((batch.weights > 0).sum())  # one query per pair
            2
        """
        slices = tuple(MixtureSlice(length=n, num_kv_pairs=k) for n, k in test_slices or ((length, num_kv_pairs),))
        mixture = (MixtureSlice(length=length, num_kv_pairs=num_kv_pairs),)
        return cls(vocab_size=vocab_size, mixture=mixture, test_mixture=slices, filler=filler)

    @property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """All (length, num_kv_pairs) of all splits, ascending."""
        return tuple(sorted({(s.length, s.num_kv_pairs) for s in (*self.mixture, *self.test_mixture)}))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"L{length}_K{pairs}" for length, pairs in self.slices)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({s.length for s in self._mixture(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        pairs = [s.num_kv_pairs for s in self._mixture(split) if s.length == length]
        if not pairs:
            raise ValueError(f"length {length} does not occur in {split}; its lengths are {self.lengths(split)}")
        return max(pairs)

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return tuple(sorted({self._context_length(s) for s in self._mixture(split) if s.length == length}))

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "mqar")
        mixture_slice = self._choose_slice(rng, split, index)
        length, pairs = mixture_slice.length, mixture_slice.num_kv_pairs
        keys = 1 + sample_without_replacement(rng, size, pairs, self.vocab_size // 2 - 1)
        values = self.vocab_size // 2 + sample_without_replacement(
            rng, size, pairs, self.vocab_size - self.vocab_size // 2
        )
        context = np.stack((keys, values), axis=2).reshape(size, 2 * pairs)
        start = self._context_length(mixture_slice)
        at = start + 2 * sample_query_slots(rng, size, pairs, (length - start) // 2, self.power_a)

        tokens = np.empty((size, length), np.int32)
        tokens[:, :start] = np.tile(context, (1, self.num_passes))
        tokens[:, start:] = self._filler(rng, keys, length - start)
        np.put_along_axis(tokens, at, keys.astype(np.int32), axis=1)
        targets = np.zeros((size, length), np.int32)
        np.put_along_axis(targets, at, values.astype(np.int32), axis=1)
        weights = np.zeros((size, length), np.float32)
        np.put_along_axis(weights, at, np.float32(1 / pairs), axis=1)
        group = np.full((size, length), self.slices.index((length, pairs)), np.int32)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, unpacked_seq_info(size, length, start))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the token after the first occurrence, which is in the context even if the filler repeats the key."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens.tolist(), answers, strict=True):
            value: dict[int, int] = {}
            for t in range(0, len(row), 2):
                answer[t] = value.setdefault(row[t], row[t + 1])
        return answers

    def chance(self) -> float:
        """Compute the accuracy of a random value of the context: the mean of 1 / num_kv_pairs over the test slices."""
        return float(np.mean([1 / s.num_kv_pairs for s in self.test_mixture]))

    def _context_length(self, mixture_slice: MixtureSlice) -> int:
        return 2 * mixture_slice.num_kv_pairs * self.num_passes

    def _mixture(self, split: Split) -> tuple[MixtureSlice, ...]:
        return self.mixture if split == "train" else self.test_mixture

    def _choose_slice(self, rng: np.random.Generator, split: Split, index: int) -> MixtureSlice:
        if split != "train":
            return self.test_mixture[index % len(self.test_mixture)]
        ends = np.cumsum([s.num_examples for s in self.mixture])
        return self.mixture[int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))]

    def _filler(self, rng: np.random.Generator, keys: Int[np.ndarray, "B K"], count: int) -> Int[np.ndarray, "B N"]:
        rows, pairs = keys.shape
        if self.filler == "zero":
            return np.zeros((rows, count), np.int64)
        if self.filler == "zoology":
            return rng.integers(self.vocab_size, size=(rows, count))
        # The u-th id that is not a key is u + #{j: key_j - j <= u} for ascending keys, so no draw is rejected.
        offset = np.arange(rows)[:, None] * self.vocab_size
        gaps = np.sort(keys, axis=1) - np.arange(pairs) + offset
        drawn = rng.integers(self.vocab_size - pairs, size=(rows, count))
        skipped = np.searchsorted(gaps.ravel(), (drawn + offset).ravel(), side="right").reshape(rows, count)
        return drawn + skipped - np.arange(rows)[:, None] * pairs

    def _check_slice(self, mixture_slice: MixtureSlice) -> None:
        length, pairs = mixture_slice.length, mixture_slice.num_kv_pairs
        if length % 2 or pairs < 1 or mixture_slice.num_examples < 1:
            raise ConfigError(f"{mixture_slice} must have an even length, num_kv_pairs >= 1 and num_examples >= 1")
        needed = 2 * pairs * self.num_passes + 2 * pairs
        if needed > length:
            raise ConfigError(
                f"length {length} is too short for {pairs} pairs in {self.num_passes} passes and {pairs} queries; "
                f"it must be at least 2 K num_passes + 2 K = {needed}: increase length, or reduce num_kv_pairs or "
                "num_passes"
            )
        if pairs > self.vocab_size // 2 - 1:
            raise ConfigError(
                f"vocab_size {self.vocab_size} has {self.vocab_size // 2 - 1} keys but a slice has {pairs} pairs; "
                f"vocab_size must be at least {2 * pairs + 2}"
            )


def sample_query_slots(
    rng: np.random.Generator, rows: int, count: int, slots: int, power: float
) -> Int[np.ndarray, "B K"]:
    """Draw slots successively without replacement with p(s) ∝ (s + 1)^(power - 1).

    This is an exponential race: slot s arrives after an exponential time of rate p(s), and the first arrivals, in their
    order, are distributed as successive draws with renormalization.

    Args:
        rng: Random generator.
        rows: Number of rows B.
        count: Draws per row K, at most `slots`.
        slots: Draws are from `range(slots)`.
        power: Exponent of the distribution.

    Returns:
        The slots in the order of the draws.
    """
    arrival = rng.standard_exponential((rows, slots)) * np.arange(1, slots + 1) ** (1 - power)
    return np.argsort(arrival, axis=1)[:, :count]
