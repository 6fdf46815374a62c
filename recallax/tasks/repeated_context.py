"""Repeated contexts: JRT-Prompt, and strategies for prompts shorter than the prefix of the training run.

Both replace the context at the start of a row (`SeqInfo.prefix`) by several copies of it, of which the first may be cut
at its start and the last is complete. The rest of the row is unchanged. Only the last copy keeps the targets of the
context. Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), sections 3 and 5.
"""

import abc
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, require_at_least, suggest_name
from recallax.tasks.base import Split, Task
from recallax.tasks.task_transform import TaskTransform
from recallax.types import AnyArray, Batch, SeqInfo

FillStrategy = Literal["left_pad", "twice", "iterate"]


class RepeatedContext(TaskTransform, abc.ABC):
    """A task transform that repeats the context of each row."""

    @abc.abstractmethod
    def repeated_length(self, size: int) -> int:
        """Compute the length of a repeated context.

        Args:
            size: Length of the context in tokens.

        Returns:
            The length that replaces it in tokens, at least `size`; 0 for an empty context.
        """

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({new for _, _, new in self._context_sizes(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        original_lengths = {old for old, _, new in self._context_sizes(split) if new == length}
        if not original_lengths:
            raise ValueError(f"length {length} does not occur in {split}; its lengths are {self.lengths(split)}")
        return max(self.task.max_targets(split, old) for old in original_lengths)

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return tuple(
            sorted({self.repeated_length(size) for _, size, new in self._context_sizes(split) if new == length})
        )

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        batch = self.task.batch(seed, split, index, size)
        sizes = np.asarray(batch.seq.prefix).sum(axis=1)
        return repeat_batch_context(batch, np.array([self.repeated_length(n) for n in sizes.tolist()]))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Return the task's answers to the original rows."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens, answers, strict=True):
            size = self._context_length(row)
            increase = self.repeated_length(size) - size
            answer[increase:] = self.task.solve(row[None, increase:])[0]
        return answers

    @abc.abstractmethod
    def _context_length(self, row: Int[np.ndarray, " T"]) -> int:
        """Length of the context that was repeated at the start of a row."""

    def _is_repeated(self, row: Int[np.ndarray, " T"], size: int) -> bool:
        """True if the row starts with copies of its first `size` tokens."""
        total = self.repeated_length(size)
        return total < len(row) and bool(np.all(row[size:total] == row[: total - size]))

    def _context_sizes(self, split: Split) -> list[tuple[int, int, int]]:
        """List (original row length, context length, new row length)."""
        rows = [
            (length, size) for length in self.task.lengths(split) for size in self.task.prefix_lengths(split, length)
        ]
        return [(length, size, length + self.repeated_length(size) - size) for length, size in rows]


@dataclass(frozen=True, kw_only=True)
class JRTPrompt(RepeatedContext):
    """Repeat the context `num_repeats` times (JRT-Prompt)."""

    num_repeats: int = 2
    """Number of copies of the context."""

    def __post_init__(self) -> None:
        require_at_least(1, "JRTPrompt.", num_repeats=self.num_repeats)

    def repeated_length(self, size: int) -> int:
        return self.num_repeats * size

    def _context_length(self, row: Int[np.ndarray, " T"]) -> int:
        # A short start of a row may repeat by chance, a long one does not.
        return next((n for n in range(len(row) // self.num_repeats, 0, -1) if self._is_repeated(row, n)), 0)


@dataclass(frozen=True, kw_only=True)
class PrefixFill(RepeatedContext):
    """Extend contexts that are shorter than the prefix that a model was trained with.

    The strategies are: "left_pad" keeps the context as it is. (The published code pads it with spaces, which
    convolutions and windows then read. Here no layer reads padding, so none is added.) "twice" repeats the context
    once, cut to `prefix_length`. "iterate" repeats it until the prefix is full.
    """

    prefix_length: int
    """Prefix length in tokens of the training run (1024 in the published models)."""
    strategy: FillStrategy = "twice"
    """Strategy for contexts shorter than `prefix_length`."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(FillStrategy):
            raise ConfigError(
                f"PrefixFill.strategy is {self.strategy!r}{suggest_name(self.strategy, list(get_args(FillStrategy)))}"
            )
        require_at_least(1, "PrefixFill.", prefix_length=self.prefix_length)

    def repeated_length(self, size: int) -> int:
        lengths = {"left_pad": size, "twice": 2 * size, "iterate": self.prefix_length if size else 0}
        return max(size, min(lengths[self.strategy], self.prefix_length))

    def _context_length(self, row: Int[np.ndarray, " T"]) -> int:
        # Several copies of the context repeat too, so the shortest repeating start is the context.
        return next((n for n in range(1, min(self.prefix_length, len(row))) if self._is_repeated(row, n)), 0)


class ContextRepetition(NamedTuple):
    """Repetition of contexts at inference: they are extended first and then repeated."""

    num_repeats: int = 1
    """Number of copies of the extended context."""
    fill_strategy: FillStrategy = "left_pad"
    """Strategy for contexts shorter than `prefix_length`; see `PrefixFill`."""
    prefix_length: int | None = None
    """Context length in tokens of the training run; needed by strategies other than "left_pad"."""

    def apply_to_task(self, task: Task) -> Task:
        """Wrap a task such that its contexts are extended and repeated.

        Args:
            task: The task.

        Returns:
            The wrapped task, or the task itself if nothing changes.

        Raises:
            ConfigError: `fill_strategy` needs a `prefix_length`.
        """
        if self.fill_strategy != "left_pad" and self.prefix_length is None:
            raise ConfigError(
                f"fill_strategy {self.fill_strategy!r} needs prefix_length, the context length in tokens of the "
                "training run"
            )
        if self.prefix_length is not None:
            task = PrefixFill(task=task, prefix_length=self.prefix_length, strategy=self.fill_strategy)
        return task if self.num_repeats == 1 else JRTPrompt(task=task, num_repeats=self.num_repeats)

    def apply_to_context(self, context: Int[np.ndarray, " N"], task: Task) -> Int[np.ndarray, " M"]:
        """Extend and repeat one context as `apply_to_task` does for a task.

        Args:
            context: Token ids of the context.
            task: The task that the model was trained on.

        Returns:
            The token ids to read instead.

        Raises:
            ConfigError: `fill_strategy` needs a `prefix_length`.
        """
        transforms, wrapped = [], self.apply_to_task(task)
        while wrapped is not task and isinstance(wrapped, RepeatedContext):
            transforms.append(wrapped)
            wrapped = wrapped.task
        for transform in reversed(transforms):
            context = tile_context(context, transform.repeated_length(len(context)))
        return context


def tile_context(context: Int[np.ndarray, " N"], length: int) -> Int[np.ndarray, " M"]:
    """Repeat a context and drop tokens from the front until `length` remain.

    Args:
        context: Token ids.
        length: Length of the result in tokens, at least that of the context.

    Returns:
        The last `length` tokens of the repeated context.
    """
    return context[(np.arange(length) - length) % max(len(context), 1)]


def repeat_batch_context(batch: Batch, context_lengths: Int[np.ndarray, " B"]) -> Batch:
    """Replace the context of each row by its repetition.

    All rows become longer by the largest increase, and shorter rows are padded at the end.

    Args:
        batch: A batch whose rows are single documents that start with their prefix.
        context_lengths: New length in tokens of each row's context, at least the present one.

    Returns:
        The longer batch.

    Raises:
        ValueError: A row has several documents, or does not start with its prefix.
    """
    segments, prefix = np.asarray(batch.seq.segment_ids), np.asarray(batch.seq.prefix)
    length = prefix.shape[1]
    sizes = prefix.sum(axis=1)
    if segments.max(initial=0) > 1 or not np.array_equal(prefix, np.arange(length) < sizes[:, None]):
        raise ValueError("contexts can be repeated only in rows of one document each that starts with its prefix")
    increase = (context_lengths - sizes)[:, None]
    time = np.arange(length + int(increase.max(initial=0)))[None]
    source = np.where(time < increase, (time - increase) % np.maximum(sizes[:, None], 1), time - increase)
    inside = source < length
    source = np.minimum(source, length - 1)

    def gather(x: AnyArray) -> np.ndarray:
        values = np.asarray(x)
        return np.where(inside, np.take_along_axis(values, source, axis=1), 0).astype(values.dtype)

    weights = gather(batch.weights) * (time >= increase)
    positions = np.broadcast_to(time.astype(np.int32), source.shape)
    seq = SeqInfo(positions, gather(segments), time < context_lengths[:, None], batch.seq.key)
    targets, term, group = (gather(x) for x in (batch.targets, batch.term, batch.group))
    return Batch(gather(batch.tokens), targets, weights.astype(np.float32), term, group, seq)
