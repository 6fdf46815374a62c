# pyright: strict
"""The base class of tasks: a frozen config whose batches are a pure function of (seed, split, index).

The batch index is the data position. So a run resumes from its step alone, and any number of processes reads the same
batches. Batches are numpy arrays; a task can be used without the rest of recallax.
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
CHANCE_BATCHES, CHANCE_BATCH_SIZE = 60, 32
"""Test batches that `most_frequent_token_accuracy` measures: 1920 rows, for a standard error of about 0.01."""


class Task(Config, abc.ABC):
    """A stream of labelled sequences. Subclasses are frozen keyword-only dataclasses and validate themselves."""

    vocab_size: int
    """Number of token ids; every id in `Batch.tokens` and `Batch.targets` is below it. A field or a property."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms; `Batch.term` indexes them and `Train.loss_weights` weights them by name."""
        return ("next_token",)

    @property
    @abc.abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of targets for which metrics are reported; `Batch.group` indexes them."""

    @abc.abstractmethod
    def lengths(self, split: Split) -> tuple[int, ...]:
        """List the sequence lengths of a split.

        Args:
            split: Name of the split.

        Returns:
            All lengths in tokens, ascending. All rows of one batch have the same length.
        """

    @abc.abstractmethod
    def max_targets(self, split: Split, length: int) -> int:
        """Bound the number of weighted positions in a row; logits are computed at that many positions.

        Args:
            split: Name of the split.
            length: One of `lengths(split)`.

        Returns:
            The largest number of positions with a non-zero weight in any row of that length.

        Raises:
            ValueError: The split has no rows of that length.
        """

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        """List the lengths of the context before the first target, which `SeqInfo.prefix` marks.

        Args:
            split: Name of the split.
            length: One of `lengths(split)`.

        Returns:
            All context lengths in tokens of rows of that length, ascending; (0,) for a task without such a context.
        """
        return (0,)

    @property
    def document_grid(self) -> int | None:
        """Documents start at multiples of it; None: rows have one document, or it is not known before the batch."""
        return None

    @abc.abstractmethod
    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        """Make one batch, a pure function of the arguments.

        Args:
            seed: Seed of the data, at least 0.
            split: Name of the split.
            index: Number of the batch in its split, at least 0.
            size: Number of rows.

        Returns:
            A batch of numpy arrays.
        """

    @abc.abstractmethod
    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Solve rows from their tokens alone.

        Args:
            tokens: Rows of the test split.

        Returns:
            The target at every weighted position; any value elsewhere.
        """

    @property
    def encoder(self) -> Encoder | None:
        """The conversion between text and token ids; None for a task without text."""
        return None

    def data_digest(self) -> str:
        """Digest the data that batches are made of besides the config.

        Returns:
            A digest that is equal for equal data; "" for a task without external data.

        Raises:
            ConfigError: The data is missing.
        """
        return ""

    def metrics(
        self, split: Split, loss: Float[np.ndarray, " groups"], weight: Float[np.ndarray, " groups"]
    ) -> Mapping[str, float]:
        """Compute the metrics that the task reports besides loss and accuracy.

        Args:
            split: Name of the split.
            loss: Sum of weight times loss in nats, per group.
            weight: Sum of weights, per group.

        Returns:
            Values by name; none by default.
        """
        return {}

    @abc.abstractmethod
    def chance(self) -> float:
        """Compute the accuracy of the best guess that ignores which answer belongs to which query.

        Returns:
            A value in [0, 1].
        """


def batch_rng(seed: int, split: Split, index: int, task_name: str) -> np.random.Generator:
    """Make the random generator of one batch.

    The generator is counter-based (Philox), so different arguments never share random numbers.

    Args:
        seed: Seed of the data.
        split: Name of the split.
        index: Number of the batch in its split.
        task_name: A name that separates tasks with equal seeds; its first six bytes are used.

    Returns:
        A numpy generator.

    Raises:
        ValueError: `seed` or `index` is negative.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index is {index}; both must be at least 0")
    domain = int.from_bytes(task_name.encode()[:6].ljust(6, b"\0"), "little") << 2 | SPLITS.index(split)
    return np.random.Generator(np.random.Philox(key=[seed, domain], counter=[0, 0, 0, index]))


def most_frequent_token_accuracy(task: Task, first: int, last: int) -> float:
    """Measure the accuracy of answering every position of a row with the row's most frequent token of a range.

    This is a guess that knows the possible answers of a row but not their positions.

    Args:
        task: The task, whose test batches are used.
        first: Lowest token id of the range.
        last: Highest token id of the range.

    Returns:
        The accuracy in [0, 1], with a standard error of about 0.01.
    """
    total = weight = 0.0
    for index in range(CHANCE_BATCHES):
        batch = task.batch(0, "test", index, CHANCE_BATCH_SIZE)
        tokens, targets, weights = (np.asarray(x) for x in (batch.tokens, batch.targets, batch.weights))
        counts = (tokens[..., None] == np.arange(first, last + 1)).sum(axis=1)
        guess = first + counts.argmax(axis=1)[:, None]
        correct: Float[np.ndarray, "B T"] = (targets == guess) * weights
        total += float(np.sum(correct))
        weight += float(np.sum(weights))
    return total / weight
