"""What a task is: a frozen config whose batches are a pure function of (seed, split, index).

Because the batch index is the data position, resuming a run needs nothing but its step, and any number of
processes sees the same stream. Batches are numpy; a task can be used without the rest of recallax.
"""

import abc
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from recallax.config import Config
from recallax.tasks.encoder import Encoder
from recallax.types import Batch

type Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Task(Config, abc.ABC):
    """A stream of labelled sequences. Subclasses are frozen keyword-only dataclasses and validate themselves."""

    vocab_size: int
    """Every id in `Batch.tokens` and `Batch.targets` is below it (a field, or a property where there are extra ids)."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms; `Batch.term` indexes them and the trainer weighs them by name."""
        return ("next_token",)

    @property
    @abc.abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Names of the buckets that metrics are sliced by; `Batch.group` indexes them."""

    @abc.abstractmethod
    def lengths(self, split: Split) -> tuple[int, ...]:
        """Every sequence length that the split can yield, ascending. All rows of one batch share one length."""

    @abc.abstractmethod
    def max_targets(self, split: Split, length: int) -> int:
        """Most positions with a weight in any row of that length: logits are computed only there."""

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        """Every size, ascending, of the context that rows of that length begin with, which `SeqInfo.prefix` marks.

        It is what is read before anything is asked; (0,) where questions stand among what they ask for.
        """
        return (0,)

    @abc.abstractmethod
    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        """Batch number `index` of a split: numpy arrays, `size` rows. Pure in its arguments."""

    @abc.abstractmethod
    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """An oracle that sees tokens only; right at every position that carries weight in the test split."""

    @property
    def encoder(self) -> Encoder | None:
        """Between text and token ids, where a task has text."""
        return None

    def data_digest(self) -> str:
        """A digest of what batches are made of besides the config; "" where that is nothing. May raise ConfigError."""
        return ""

    def metrics(
        self, split: Split, loss: Float[np.ndarray, " groups"], weight: Float[np.ndarray, " groups"]
    ) -> Mapping[str, float]:
        """What the task reports besides loss and accuracy, from its groups' sums of weight x loss (nats) and weight."""
        return {}

    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy of the best guess that ignores which answer belongs to which question, in [0, 1]."""


def batch_rng(seed: int, split: Split, index: int, task_name: str) -> np.random.Generator:
    """The random stream of one batch: counter-based (Philox), so distinct arguments never share numbers.

    `task_name` is a name that keeps different tasks with one seed apart.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; both must be at least 0")
    domain = int.from_bytes(task_name.encode()[:6].ljust(6, b"\0"), "little") << 2 | SPLITS.index(split)
    return np.random.Generator(np.random.Philox(key=[seed, domain], counter=[0, 0, 0, index]))


def most_frequent_token_accuracy(task: Task, first: int, last: int) -> float:
    """Accuracy of answering each row, everywhere, with its commonest token among ids first..last.

    What a guess scores that sees which answers a row may ask for but not where; measured on 60 test batches, so to
    about one per cent.
    """
    total = weight = 0.0
    for index in range(60):
        tokens, targets, weights, *_ = task.batch(0, "test", index, 32)
        counts = (tokens[..., None] == np.arange(first, last + 1)).sum(axis=1)
        guess = first + counts.argmax(axis=1)[:, None]
        total += float(np.sum((targets == guess) * weights))
        weight += float(np.sum(weights))
    return total / weight
