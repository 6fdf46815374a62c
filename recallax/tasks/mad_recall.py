"""The recall tasks of Mechanistic Architecture Design: in-context, noisy and fuzzy (Poli et al. 2024, section 3.1).

The fields are the published difficulty settings and the defaults are the published baselines. As in the release, train
batches label every next token, and valid and test batches only the answers. Two points differ: rows keep their last
token, which has no target, and padding is on the right. `mad.py` has the other three tasks and further differences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import Split, Task, batch_rng, most_frequent_token_accuracy
from recallax.tasks.random_ids import first_occurrence, sample_without_replacement
from recallax.types import Batch, unpacked_seq_info


class _UnlabelledRows(NamedTuple):
    """Generated rows, before targets and weights are added."""

    tokens: Int[np.ndarray, "B T"]
    answer: Bool[np.ndarray, "B T"]
    """True where the token is the answer to a repeated key."""
    lengths: Int[np.ndarray, " B"]
    """Tokens of each row before its padding."""


@dataclass(frozen=True, kw_only=True)
class _MADRecall(Task):
    """Common part of the recall tasks: rows of `length` tokens, each answer predicted at the position before it."""

    length: int = 128
    """Row length in tokens."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The answers ("recall") and all other next tokens ("other"), which have weight in train only."""
        return ("other", "recall")

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def _label(self, rows: _UnlabelledRows, split: Split) -> Batch:
        tokens, answer, lengths = rows
        size, length = tokens.shape
        real = np.arange(length) < lengths[:, None]
        targets = np.zeros((size, length), np.int32)
        targets[:, :-1] = tokens[:, 1:] * real[:, 1:]
        labelled = answer if split != "train" else real
        weights = np.zeros((size, length), np.float32)
        weights[:, :-1] = labelled[:, 1:]
        group = np.zeros((size, length), np.int32)
        group[:, :-1] = answer[:, 1:]
        seq = unpacked_seq_info(size, length)._replace(segment_ids=real.astype(np.int32))
        return Batch(tokens.astype(np.int32), targets, weights, np.zeros_like(group), group, seq)


def _key_value_rows(
    rng: np.random.Generator, size: int, length: int, content_vocab_size: int, noise_vocab_size: int, frac_noise: float
) -> _UnlabelledRows:
    """Draw length / 2 pairs, each but the last replaced by noise tokens with probability `frac_noise`.

    Of the `content_vocab_size` ids the lower half are keys and the rest values; noise ids follow them.
    """
    pairs, num_keys = length // 2, content_vocab_size // 2
    keys = rng.integers(num_keys, size=(size, pairs))
    noisy = rng.random((size, pairs)) < frac_noise
    # The last pair repeats a key, so at least one pair before it must not be noise.
    noisy[np.arange(size), rng.integers(pairs - 1, size=size)] = False
    noisy[:, -1] = False
    shown = np.zeros((size, num_keys), bool)
    row, pair = np.nonzero(~noisy[:, :-1])
    shown[row, keys[row, pair]] = True
    keys[:, -1] = np.where(shown, rng.random((size, num_keys)), -1).argmax(axis=1)

    table = rng.integers(num_keys, content_vocab_size, size=(size, num_keys))
    tokens = np.stack((keys, np.take_along_axis(table, keys, axis=1)), axis=2)
    if noise_vocab_size:
        tokens = np.where(
            noisy[..., None],
            rng.integers(content_vocab_size, content_vocab_size + noise_vocab_size, size=tokens.shape),
            tokens,
        )
    # Unique codes prevent noise pairs from counting as repeats.
    codes = np.where(noisy, num_keys + np.arange(pairs), keys)
    answer = np.zeros((size, pairs, 2), bool)
    answer[:, :, 1] = first_occurrence(codes) != np.arange(pairs)
    return _UnlabelledRows(tokens.reshape(size, length), answer.reshape(size, length), np.full(size, length))


def _first_bound_values(tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """Return at each even position the token that followed its first occurrence at an even position."""
    answers = np.zeros_like(tokens)
    for row, answer in zip(tokens.tolist(), answers, strict=True):
        value: dict[int, int] = {}
        for t in range(0, len(row), 2):
            answer[t] = value.setdefault(row[t], row[t + 1])
    return answers


@dataclass(frozen=True, kw_only=True)
class InContextRecall(_MADRecall):
    """Recall the value of each repeated key among key/value pairs.

    Keys are the ids below V / 2 and are drawn with replacement; values are the other ids. Within a row each key has one
    value, and different keys may share a value. The last pair always repeats a key of the row.
    """

    vocab_size: int = 16

    def __post_init__(self) -> None:
        _check_pairs(type(self).__name__, self.length, self.vocab_size)

    def max_targets(self, split: Split, length: int) -> int:
        return length - 1 if split == "train" else length // 2 - 1

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "recall")
        return self._label(_key_value_rows(rng, size, self.length, self.vocab_size, 0, 0.0), split)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the value that followed the first occurrence of the key."""
        return _first_bound_values(tokens)

    def chance(self) -> float:
        """Compute the accuracy of the row's most frequent value, which several keys may share."""
        return most_frequent_token_accuracy(self, self.vocab_size // 2, self.vocab_size - 1)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(_MADRecall):
    """Recall the value of each repeated key, with some pairs replaced by noise.

    The release can draw rows of noise only and fails on them; here at least one pair before the last is not noise.
    """

    vocab_size: int = 32
    """Number of ids, noise included."""
    noise_vocab_size: int = 16
    """Number of noise ids, which are the highest ones."""
    frac_noise: float = 0.2
    """Probability that a pair is replaced by two noise tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.frac_noise < 1:
            raise ConfigError(f"NoisyRecall.frac_noise is {self.frac_noise}; it must be in [0, 1)")
        require_at_least(1, "NoisyRecall.", noise_vocab_size=self.noise_vocab_size)
        _check_pairs(type(self).__name__, self.length, self.vocab_size - self.noise_vocab_size)

    def max_targets(self, split: Split, length: int) -> int:
        return length - 1 if split == "train" else length // 2 - 1

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "noisy")
        content = self.vocab_size - self.noise_vocab_size
        return self._label(
            _key_value_rows(rng, size, self.length, content, self.noise_vocab_size, self.frac_noise), split
        )

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the value that followed the first occurrence of the key."""
        return _first_bound_values(tokens)

    def chance(self) -> float:
        """Compute the accuracy of the row's most frequent value, which several keys may share."""
        content = self.vocab_size - self.noise_vocab_size
        return most_frequent_token_accuracy(self, content // 2, content - 1)


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(_MADRecall):
    """Recall values of repeated keys, where keys and values are motifs of several different tokens.

    A token belongs either to keys (ids below (V - 1) / 2) or to values, so motifs need no delimiters. The order of the
    tokens matters: (1, 2) and (2, 1) are different keys. Valid and test keys have the full size, so that the end of a
    key is known. Every token of the value of a repeated key is an answer. The last pair repeats a pair of the row.

    Rows are padded on the right with id V - 1 if no further pair fits. (The release pads on the left, and for short
    motifs it may query a key that the row does not contain.)
    """

    vocab_size: int = 16
    k_motif_size: int = 3
    """Largest number of tokens of a key; train keys have from 1 to this many."""
    v_motif_size: int = 3
    """Largest number of tokens of a value; values have from 1 to this many."""

    def __post_init__(self) -> None:
        require_at_least(1, "FuzzyRecall.", k_motif_size=self.k_motif_size, v_motif_size=self.v_motif_size)
        two_pairs = 2 * (self.k_motif_size + self.v_motif_size)
        if self.length < two_pairs:
            raise ConfigError(
                f"FuzzyRecall.length is {self.length} with k_motif_size {self.k_motif_size} and v_motif_size "
                f"{self.v_motif_size}; it must be at least 2 (k_motif_size + v_motif_size) = {two_pairs}"
            )
        if self._num_keys < self.k_motif_size or self.vocab_size - 1 - self._num_keys < self.v_motif_size:
            raise ConfigError(
                f"FuzzyRecall.vocab_size is {self.vocab_size}; it must be at least "
                f"{2 * max(self.k_motif_size, self.v_motif_size) + 1}: a key or value does not repeat a token"
            )

    def max_targets(self, split: Split, length: int) -> int:
        if split == "train":
            return length - 1
        # At most: one pair with a value of one token, then repeats of the key with values that fill the row.
        remaining = length - self.k_motif_size - 1
        full_pairs = remaining // (self.k_motif_size + self.v_motif_size)
        return max(full_pairs * self.v_motif_size, remaining - (full_pairs + 1) * self.k_motif_size)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "fuzzy")
        min_key_size = 1 if split == "train" else self.k_motif_size
        count, width = self.length // (min_key_size + 1), self.k_motif_size + self.v_motif_size
        keys = _motifs(rng, (size, count), min_key_size, self.k_motif_size, self._num_keys)
        values = _motifs(rng, (size, count), 1, self.v_motif_size, self.vocab_size - 1 - self._num_keys)
        source = first_occurrence((keys + 1) @ (self._num_keys + 1) ** np.arange(self.k_motif_size))
        values = np.take_along_axis(values, source[..., None], axis=1)
        motifs = np.concatenate((keys, np.where(values < 0, -1, values + self._num_keys)), axis=2)
        repeat = source != np.arange(count)

        row = np.arange(size)
        shown = (np.cumsum((motifs >= 0).sum(axis=2), axis=1) <= self.length - width).sum(axis=1)
        motifs[row, shown], repeat[row, shown] = motifs[row, rng.integers(shown)], True
        motifs[np.arange(count) > shown[:, None]] = -1
        return self._label(self._concatenate_motifs(motifs, repeat), split)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Scan each row and return the next token of the value that the current key had before."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens.tolist(), answers, strict=True):
            known: dict[tuple[int, ...], tuple[int, ...]] = {}
            key, value = (), ()
            for t, token in enumerate(row):
                if token < self._num_keys:
                    if value:
                        known.setdefault(key, value)
                        key, value = (), ()
                    key += (token,)
                else:
                    value += (token,)
                expected = known.get(key, ())
                answer[t] = expected[len(value)] if len(value) < len(expected) else 0
        return answers

    def chance(self) -> float:
        """Compute the accuracy of the row's most frequent value token."""
        return most_frequent_token_accuracy(self, self._num_keys, self.vocab_size - 2)

    @property
    def _num_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def _concatenate_motifs(self, motifs: Int[np.ndarray, "B N W"], repeat: Bool[np.ndarray, "B N"]) -> _UnlabelledRows:
        """Concatenate the motifs of each row, skipping -1; the answers are the values of repeated pairs."""
        size = len(motifs)
        in_value = np.arange(motifs.shape[2]) >= self.k_motif_size
        flat, flat_answer = motifs.reshape(size, -1), (repeat[..., None] & in_value).reshape(size, -1)
        row, column = np.nonzero(flat >= 0)
        at = np.cumsum(flat >= 0, axis=1)[row, column] - 1
        tokens = np.full((size, self.length), self.vocab_size - 1)
        answer = np.zeros((size, self.length), bool)
        tokens[row, at], answer[row, at] = flat[row, column], flat_answer[row, column]
        return _UnlabelledRows(tokens, answer, (flat >= 0).sum(axis=1))


def _motifs(
    rng: np.random.Generator, shape: tuple[int, int], min_size: int, max_size: int, population: int
) -> Int[np.ndarray, "B N W"]:
    """Draw `shape` motifs of distinct ids below `population`, of uniform size, filled up with -1."""
    size, count = shape
    ids = sample_without_replacement(rng, size * count, max_size, population).reshape(size, count, max_size)
    sizes = rng.integers(min_size, max_size + 1, size=shape)
    return np.where(np.arange(max_size) < sizes[..., None], ids, -1)


def _check_pairs(name: str, length: int, content: int) -> None:
    if length < 4 or length % 2:
        raise ConfigError(f"{name}.length is {length}; it must be even and at least 4: the last pair repeats another")
    if content < 2:
        raise ConfigError(f"{name} has {content} ids for keys and values; vocab_size must provide at least 2")
