"""The recall tasks of Mechanistic Architecture Design: in-context, noisy and fuzzy (Poli et al. 2024, section 3.1).

Fields are the published difficulty settings, their defaults the published baselines. As in the release, train
batches label every next token, valid and test batches only the answers. Unlike there, rows keep their last token
(nothing is asked at it) and padding stands on the right. `mad.py` has the other three tasks, and what holds for all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recallax.config import ConfigError
from recallax.tasks.base import Split, Task, batch_rng, most_frequent_token_accuracy
from recallax.tasks.random_ids import first_occurrence, sample_without_replacement
from recallax.types import Batch, unpacked_seq_info


class _UnlabelledRows(NamedTuple):
    """Generated rows before labelling."""

    tokens: Int[np.ndarray, "B T"]
    answer: Bool[np.ndarray, "B T"]
    """True where the token is the answer to a repeated key."""
    lengths: Int[np.ndarray, " B"]


@dataclass(frozen=True, kw_only=True)
class _MADRecall(Task):
    """What the recall tasks share: rows of `length` tokens, answers asked for at the position before them."""

    length: int = 128

    @property
    def groups(self) -> tuple[str, ...]:
        """Answers ("recall"), and every other next token ("other"), which has weight in train only."""
        return ("other", "recall")

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def _label(self, rows: _UnlabelledRows, split: Split) -> Batch:
        tokens, answer, lengths = rows
        size, length = tokens.shape
        real = np.arange(length) < lengths[:, None]
        targets = np.zeros((size, length), np.int32)
        targets[:, :-1] = tokens[:, 1:] * real[:, 1:]
        asked = answer if split != "train" else real
        weights = np.zeros((size, length), np.float32)
        weights[:, :-1] = asked[:, 1:]
        group = np.zeros((size, length), np.int32)
        group[:, :-1] = answer[:, 1:]
        seq = unpacked_seq_info(size, length)._replace(segment_ids=real.astype(np.int32))
        return Batch(tokens.astype(np.int32), targets, weights, np.zeros_like(group), group, seq)


def _key_value_rows(
    rng: np.random.Generator, size: int, length: int, content_vocab_size: int, noise_vocab_size: int, frac_noise: float
) -> _UnlabelledRows:
    """length / 2 pairs over `content_vocab_size` ids (lower half keys), each but the last replaced by noise at rate `frac_noise`."""
    pairs, num_keys = length // 2, content_vocab_size // 2
    keys = rng.integers(num_keys, size=(size, pairs))
    noisy = rng.random((size, pairs)) < frac_noise
    # The last pair repeats a key, so at least one pair before it must be spared.
    noisy[np.arange(size), rng.integers(pairs - 1, size=size)] = False
    noisy[:, -1] = False
    presented = np.zeros((size, num_keys), bool)
    row, pair = np.nonzero(~noisy[:, :-1])
    presented[row, keys[row, pair]] = True
    keys[:, -1] = np.where(presented, rng.random((size, num_keys)), -1).argmax(axis=1)

    table = rng.integers(num_keys, content_vocab_size, size=(size, num_keys))
    tokens = np.stack((keys, np.take_along_axis(table, keys, axis=1)), axis=2)
    if noise_vocab_size:
        tokens = np.where(
            noisy[..., None],
            rng.integers(content_vocab_size, content_vocab_size + noise_vocab_size, size=tokens.shape),
            tokens,
        )
    # Codes of their own keep noise pairs from counting as repeats.
    codes = np.where(noisy, num_keys + np.arange(pairs), keys)
    answer = np.zeros((size, pairs, 2), bool)
    answer[:, :, 1] = first_occurrence(codes) != np.arange(pairs)
    return _UnlabelledRows(tokens.reshape(size, length), answer.reshape(size, length), np.full(size, length))


def _first_bound_values(tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """At each even position the token that followed its first occurrence at an even position."""
    answers = np.zeros_like(tokens)
    for row, answer in zip(tokens.tolist(), answers, strict=True):
        value: dict[int, int] = {}
        for t in range(0, len(row), 2):
            answer[t] = value.setdefault(row[t], row[t + 1])
    return answers


@dataclass(frozen=True, kw_only=True)
class InContextRecall(_MADRecall):
    """Pairs of a key (ids below V/2) and a value (the rest), keys drawn with replacement, one value per key and row.

    The answer to every repeated key is its value; the last pair repeats a key of the row for certain. Different
    keys of a row may share a value.
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
        """The value that followed the key first."""
        return _first_bound_values(tokens)

    def chance(self) -> float:
        """The commonest value of the row: several keys may share it."""
        return most_frequent_token_accuracy(self, self.vocab_size // 2, self.vocab_size - 1)


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(_MADRecall):
    """In-context recall in which each pair is replaced by two noise tokens with probability `frac_noise`.

    `vocab_size` includes `noise_vocab_size` ids of noise, the highest ones. The release can draw rows that are noise
    only, and fails on them; here one pair is always spared.
    """

    vocab_size: int = 32
    noise_vocab_size: int = 16
    frac_noise: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.frac_noise < 1 or self.noise_vocab_size < 1:
            raise ConfigError(
                f"NoisyRecall.frac_noise is {self.frac_noise} over {self.noise_vocab_size} ids; it must lie in [0, 1) and have an id"
            )
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
        """The value that followed the key first."""
        return _first_bound_values(tokens)

    def chance(self) -> float:
        """The commonest value of the row: several keys may share it."""
        content = self.vocab_size - self.noise_vocab_size
        return most_frequent_token_accuracy(self, content // 2, content - 1)


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(_MADRecall):
    """In-context recall whose keys are 1 to `k_motif_size` and whose values 1 to `v_motif_size` different tokens long.

    A token belongs to keys (ids below (V - 1) / 2) or to values, so runs of either kind delimit themselves; keys are
    ordered: (1, 2) and (2, 1) differ. Valid and test use keys of full width only, so that a key is known to be
    complete; every token of the value of a repeated key is an answer. The last pair repeats one of the row.

    Rows are padded on the right with id V - 1 where no further pair fits (the release pads on the left, and for
    narrow pairs may ask for a key that it never showed).
    """

    vocab_size: int = 16
    k_motif_size: int = 3
    v_motif_size: int = 3

    def __post_init__(self) -> None:
        widest = 2 * (self.k_motif_size + self.v_motif_size)
        if min(self.k_motif_size, self.v_motif_size) < 1 or self.length < widest:
            raise ConfigError(
                f"FuzzyRecall.length is {self.length} with widths {self.k_motif_size} and {self.v_motif_size}; widths must "
                f"be at least 1 and the length must hold two of the widest pairs ({widest})"
            )
        if self._num_keys < self.k_motif_size or self.vocab_size - 1 - self._num_keys < self.v_motif_size:
            raise ConfigError(
                f"FuzzyRecall.vocab_size is {self.vocab_size}; it must be at least "
                f"{2 * max(self.k_motif_size, self.v_motif_size) + 1}: keys and values have no token twice"
            )

    def max_targets(self, split: Split, length: int) -> int:
        if split == "train":
            return length - 1
        # At best one pair with a value of one token, and then as many value tokens as the keys leave room for.
        room = length - self.k_motif_size - 1
        wide = room // (self.k_motif_size + self.v_motif_size)
        return max(wide * self.v_motif_size, room - (wide + 1) * self.k_motif_size)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "fuzzy")
        narrowest = 1 if split == "train" else self.k_motif_size
        count, width = self.length // (narrowest + 1), self.k_motif_size + self.v_motif_size
        keys = _motifs(rng, (size, count), narrowest, self.k_motif_size, self._num_keys)
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
        """The next token of the value that the current run of key tokens had before; reads from left to right."""
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
        """The commonest value token of the row."""
        return most_frequent_token_accuracy(self, self._num_keys, self.vocab_size - 2)

    @property
    def _num_keys(self) -> int:
        return (self.vocab_size - 1) // 2

    def _concatenate_motifs(self, motifs: Int[np.ndarray, "B N W"], repeat: Bool[np.ndarray, "B N"]) -> _UnlabelledRows:
        """Rows of the motifs' tokens one after the other (-1 is no token); answers are the values of repeats."""
        size = len(motifs)
        in_value = np.arange(motifs.shape[2]) >= self.k_motif_size
        flat, asked = motifs.reshape(size, -1), (repeat[..., None] & in_value).reshape(size, -1)
        row, column = np.nonzero(flat >= 0)
        at = np.cumsum(flat >= 0, axis=1)[row, column] - 1
        tokens = np.full((size, self.length), self.vocab_size - 1)
        answer = np.zeros((size, self.length), bool)
        tokens[row, at], answer[row, at] = flat[row, column], asked[row, column]
        return _UnlabelledRows(tokens, answer, (flat >= 0).sum(axis=1))


def _motifs(
    rng: np.random.Generator, shape: tuple[int, int], min_size: int, max_size: int, population: int
) -> Int[np.ndarray, "B N W"]:
    """`shape` ordered draws of different ids below `population`, of uniform width; -1 stands behind the narrower ones."""
    size, count = shape
    ids = sample_without_replacement(rng, size * count, max_size, population).reshape(size, count, max_size)
    widths = rng.integers(min_size, max_size + 1, size=shape)
    return np.where(np.arange(max_size) < widths[..., None], ids, -1)


def _check_pairs(name: str, length: int, content: int) -> None:
    if length < 4 or length % 2:
        raise ConfigError(f"{name}.length is {length}; it must be even and at least 4: the last pair repeats another")
    if content < 2:
        raise ConfigError(f"{name} has {content} ids for keys and values; vocab_size must leave at least 2")
