"""Mechanistic Architecture Design's selective copying, compression and memorization (Poli et al. 2024, section 3.1).

Fields are the published difficulty settings and their defaults the published baselines; a MAD score is a mean over
runs that change one field at a time. For all six tasks (the recall tasks are in `mad_recall.py`): every batch is
fresh, where the release repeats 12,800 rows (memorization: 256) for 200 epochs, so its axis of fewer rows has no
counterpart; and accuracy counts every labelled position once.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError
from recallax.tasks.base import Split, Task, batch_rng, most_frequent_token_accuracy
from recallax.types import Batch, unpacked_seq_info


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """Repeat in order the `num_tokens_to_copy` tokens that are scattered among blanks.

    A row is a body of content tokens and blanks (id V - 2), the copy token (id V - 1), and `num_tokens_to_copy` blanks, at
    which the content tokens are the targets. Only these carry weight, in every split.

    Each blank of the body falls into one of the content + 1 gaps with equal chance. The release leaves out the gap
    behind the last content token, which therefore always stands right before the copy token, and draws the gaps
    from numpy's unseeded generator.
    """

    vocab_size: int = 16
    length: int = 256
    num_tokens_to_copy: int = 16

    def __post_init__(self) -> None:
        if self.num_tokens_to_copy < 1 or self.length < 2 * self.num_tokens_to_copy + 1:
            raise ConfigError(
                f"SelectiveCopying.length is {self.length} with {self.num_tokens_to_copy} content tokens; it must be at least "
                f"2 content + 1 = {2 * self.num_tokens_to_copy + 1}"
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
        """What is neither blank nor the copy token, in order, at the end."""
        answers = np.zeros_like(tokens)
        answers[:, -self.num_tokens_to_copy :] = tokens[tokens < self.vocab_size - 2].reshape(
            len(tokens), self.num_tokens_to_copy
        )
        return answers

    def chance(self) -> float:
        """The commonest content token of the row."""
        return most_frequent_token_accuracy(self, 0, self.vocab_size - 3)

    @property
    def _body_length(self) -> int:
        return self.length - self.num_tokens_to_copy - 1


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Reconstruct a row of random tokens from the model's output at its last position.

    The target at t is the token at t itself. A causal head would copy its input, so the task is for a model with a
    read-out of its own: the last output and the position t predict token t. The last token is the compress token
    (id V - 1); it is the same in every row and carries no weight (the release scores it, which adds up to 1/length).
    """

    vocab_size: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        if self.length < 2 or self.vocab_size < 2:
            raise ConfigError(
                f"Compression.length is {self.length} and vocab_size {self.vocab_size}; both must be at least 2"
            )

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
        """The commonest token of the row."""
        return most_frequent_token_accuracy(self, 0, self.vocab_size - 2)


@dataclass(frozen=True, kw_only=True)
class Memorization(Task):
    """Learn by heart one table from keys to values that is the same in all rows, seeds and splits.

    A row alternates a random key (ids below (V - 1) / 2) and the insert token (id V - 1), at which the key's value
    is the target; values never occur in a row. The table is one-to-one and depends on `vocab_size` and `table_seed`
    only. Measures parameters rather than the mixer.
    """

    vocab_size: int = 256
    length: int = 32
    table_seed: int = 12345

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
        """Looks the key up in the table, which is part of the task."""
        answers = np.zeros_like(tokens)
        answers[:, 1::2] = self.table[tokens[:, ::2]]
        return answers

    def chance(self) -> float:
        """One of the table's values."""
        return 1 / len(self.table)
