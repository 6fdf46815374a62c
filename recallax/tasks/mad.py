"""Mechanistic Architecture Design's selective copying, compression and memorization (Poli et al. 2024, section 3.1).

The fields are the published difficulty settings and the defaults are the published baselines. A MAD score is a mean
over runs that change one field at a time. Two points differ from the release for all six tasks (`mad_recall.py` has the
recall tasks): every batch is new, while the release repeats 12,800 rows (memorization: 256) for 200 epochs, so there is
no setting for fewer rows; and accuracy counts every labelled position once.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, require_at_least
from recallax.tasks.base import Split, Task, batch_rng, most_frequent_token_accuracy
from recallax.types import Batch, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Repeat the content tokens among blanks, in order.

    A row is a body of content tokens and blanks (id V - 2), the copy token (id V - 1) and `num_tokens_to_copy` blanks,
    at which the content tokens are the targets. Only these have weight, in every split.

    Each blank of the body is placed in one of the num_tokens_to_copy + 1 gaps with equal probability. The release omits
    the gap after the last content token, so that token always precedes the copy token, and it draws the gaps from
    numpy's unseeded generator.
    """

    vocab_size: int = 16
    length: int = 256
    """Row length in tokens."""
    num_tokens_to_copy: int = 16
    """Number of content tokens."""

    def __post_init__(self) -> None:
        if self.num_tokens_to_copy < 1 or self.length < 2 * self.num_tokens_to_copy + 1:
            raise ConfigError(
                f"SelectiveCopying.length is {self.length}; it must be at least 2 num_tokens_to_copy + 1 = "
                f"{2 * self.num_tokens_to_copy + 1}"
            )
        if self.vocab_size < 3:
            raise ConfigError(f"SelectiveCopying.vocab_size is {self.vocab_size}; it must be at least 3 (blank, copy)")

    @property
    def groups(self) -> tuple[str, ...]:
        return ("copy",)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def max_targets(self, split: Split, length: int) -> int:
        return self.num_tokens_to_copy

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return (self._body_length,)

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "selcpy")
        content = rng.integers(self.vocab_size - 2, size=(size, self.num_tokens_to_copy))
        gaps = self.num_tokens_to_copy + 1
        blanks = (
            rng.integers(gaps, size=(size, self._body_length - self.num_tokens_to_copy))
            + gaps * np.arange(size)[:, None]
        )
        per_gap = np.bincount(blanks.ravel(), minlength=size * gaps).reshape(size, gaps)
        at = np.arange(self.num_tokens_to_copy) + np.cumsum(per_gap, axis=1)[:, :-1]

        tokens = np.full((size, self.length), self.vocab_size - 2, np.int32)
        np.put_along_axis(tokens, at, content.astype(np.int32), axis=1)
        tokens[:, -self.num_tokens_to_copy - 1] = self.vocab_size - 1
        targets, weights = np.zeros((size, self.length), np.int32), np.zeros((size, self.length), np.float32)
        targets[:, -self.num_tokens_to_copy :], weights[:, -self.num_tokens_to_copy :] = content, 1
        seq = unpacked_seq_info(size, self.length, self._body_length)
        return Batch(tokens, targets, weights, np.zeros_like(targets), np.zeros_like(targets), seq)

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the content tokens, in order, at the end."""
        answers = np.zeros_like(tokens)
        answers[:, -self.num_tokens_to_copy :] = tokens[tokens < self.vocab_size - 2].reshape(
            len(tokens), self.num_tokens_to_copy
        )
        return answers

    def chance(self) -> float:
        """Compute the accuracy of the most frequent content token of the row."""
        return most_frequent_token_accuracy(self, 0, self.vocab_size - 3)

    @property
    def _body_length(self) -> int:
        return self.length - self.num_tokens_to_copy - 1


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Reconstruct a row of random tokens from the model's output at the last position.

    The target at t is the token at t. A causal head would copy its input, so the task needs a model whose head predicts
    token t from the last output and the position t (`Autoencoder`). The last token is the compress token (id V - 1); it
    is the same in every row and has no weight (the release scores it, which adds up to 1 / length).
    """

    vocab_size: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        require_at_least(2, "Compression.", length=self.length, vocab_size=self.vocab_size)

    @property
    def terms(self) -> tuple[str, ...]:
        return ("reconstruction",)

    @property
    def groups(self) -> tuple[str, ...]:
        return ("reconstruction",)

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def max_targets(self, split: Split, length: int) -> int:
        return length - 1

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "compr")
        tokens = rng.integers(self.vocab_size - 1, size=(size, self.length)).astype(np.int32)
        tokens[:, -1] = self.vocab_size - 1
        weights = np.ones((size, self.length), np.float32)
        weights[:, -1] = 0
        return Batch(
            tokens,
            tokens.copy(),
            weights,
            np.zeros_like(tokens),
            np.zeros_like(tokens),
            unpacked_seq_info(size, self.length),
        )

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """The tokens."""
        return tokens.copy()

    def chance(self) -> float:
        """Compute the accuracy of the most frequent token of the row."""
        return most_frequent_token_accuracy(self, 0, self.vocab_size - 2)


@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """Memorize one table from keys to values, which is the same in all rows, seeds and splits.

    A row alternates a random key (ids below (V - 1) / 2) and the insert token (id V - 1), at which the key's value
    is the target; values never occur in a row. The table is one-to-one and depends only on `vocab_size` and
    `table_seed`. The task measures the capacity of the parameters rather than the mixer.
    """

    vocab_size: int = 256
    length: int = 32
    table_seed: int = 12345
    """Seed of the table."""

    def __post_init__(self) -> None:
        if self.length < 2 or self.length % 2:
            raise ConfigError(f"Memorization.length is {self.length}; it must be even and at least 2")
        if self.vocab_size < 3:
            raise ConfigError(
                f"Memorization.vocab_size is {self.vocab_size}; it must be at least 3 (key, value, insert)"
            )

    @property
    def groups(self) -> tuple[str, ...]:
        return ("recall",)

    @property
    def table(self) -> Int[np.ndarray, " K"]:
        """The value of each key."""
        num_keys = (self.vocab_size - 1) // 2
        values = np.arange(num_keys, self.vocab_size - 1)
        return batch_rng(self.table_seed, "train", 0, "table").permutation(values)[:num_keys]

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,)

    def max_targets(self, split: Split, length: int) -> int:
        return length // 2

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        keys = batch_rng(seed, split, index, "memor").integers(len(self.table), size=(size, self.length // 2))
        tokens = np.full((size, self.length), self.vocab_size - 1, np.int32)
        tokens[:, ::2] = keys
        targets, weights = np.zeros((size, self.length), np.int32), np.zeros((size, self.length), np.float32)
        targets[:, 1::2], weights[:, 1::2] = self.table[keys], 1
        return Batch(
            tokens,
            targets,
            weights,
            np.zeros_like(targets),
            np.zeros_like(targets),
            unpacked_seq_info(size, self.length),
        )

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Look the keys up in the table."""
        answers = np.zeros_like(tokens)
        answers[:, 1::2] = self.table[tokens[:, ::2]]
        return answers

    def chance(self) -> float:
        """Compute the accuracy of one value of the table at random."""
        return 1 / len(self.table)
