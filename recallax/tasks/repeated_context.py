"""Contexts that are read more than once: JRT-Prompt, and the ways of filling a prompt that is too short.

Both replace the context that a row begins with (`SeqInfo.prefix`) by the end of its endless repetition, so that its
last copy is whole, and leave everything behind it as it is. Only that copy keeps the labels that a context may have.
Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), sections 3 and 5.
"""

import abc
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, suggest_name
from recallax.tasks.base import Split, Task
from recallax.tasks.task_transform import TaskTransform
from recallax.types import AnyArray, Batch, SeqInfo

FillStrategy = Literal["left_pad", "twice", "iterate"]


class RepeatedContext(TaskTransform, abc.ABC):
    """What both have in common."""

    @abc.abstractmethod
    def repeated_length(self, size: int) -> int:
        """Tokens to read instead of a context of `size`, at least as many; 0 for none."""

    def lengths(self, split: Split) -> tuple[int, ...]:
        return tuple(sorted({new for _, _, new in self._context_sizes(split)}))

    def max_targets(self, split: Split, length: int) -> int:
        found = {old for old, _, new in self._context_sizes(split) if new == length}
        if not found:
            raise ValueError(f"length {length} does not occur in {split}; its lengths are {self.lengths(split)}")
        return max(self.task.max_targets(split, old) for old in found)

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return tuple(
            sorted({self.repeated_length(size) for _, size, new in self._context_sizes(split) if new == length})
        )

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        batch = self.task.batch(seed, split, index, size)
        sizes = np.asarray(batch.seq.prefix).sum(axis=1)
        return repeat_batch_context(batch, np.array([self.repeated_length(n) for n in sizes.tolist()]))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """What the task answers to the rows as they were before."""
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens, answers, strict=True):
            size = self._context_length(row)
            more = self.repeated_length(size) - size
            answer[more:] = self.task.solve(row[None, more:])[0]
        return answers

    @abc.abstractmethod
    def _context_length(self, row: Int[np.ndarray, " T"]) -> int:
        """The size of the context that was repeated at the beginning of a row."""

    def _is_repeated(self, row: Int[np.ndarray, " T"], size: int) -> bool:
        """The row may begin with a context of that size, reread."""
        total = self.repeated_length(size)
        return total < len(row) and bool(np.all(row[size:total] == row[: total - size]))

    def _context_sizes(self, split: Split) -> list[tuple[int, int, int]]:
        """Lengths before, sizes of contexts, and lengths after."""
        rows = [
            (length, size) for length in self.task.lengths(split) for size in self.task.prefix_lengths(split, length)
        ]
        return [(length, size, length + self.repeated_length(size) - size) for length, size in rows]


@dataclass(frozen=True, kw_only=True)
class JRTPrompt(RepeatedContext):
    """JRT-Prompt: the context `num_repeats` times in a row, then the rest."""

    num_repeats: int = 2

    def __post_init__(self) -> None:
        if self.num_repeats < 1:
            raise ConfigError(f"JRTPrompt.num_repeats is {self.num_repeats}; it must be at least 1")

    def repeated_length(self, size: int) -> int:
        return self.num_repeats * size

    def _context_length(self, row: Int[np.ndarray, " T"]) -> int:
        # A short beginning may repeat by chance, a long one does not.
        return next((n for n in range(len(row) // self.num_repeats, 0, -1) if self._is_repeated(row, n)), 0)


@dataclass(frozen=True, kw_only=True)
class PrefixFill(RepeatedContext):
    """A context shorter than the prefix of `prefix_length` tokens that a model was trained with is brought nearer to it.

    left_pad: not at all. The published code pads it with spaces, which convolutions and windows then read; here padding
    is read by no layer, so none is needed. twice: it is read twice, or as much of that as there is room for.
    iterate: it is read again and again until the prefix is full.
    """

    prefix_length: int
    """Prefix tokens that the model was trained with (1024 in the published models)."""
    strategy: FillStrategy = "twice"

    def __post_init__(self) -> None:
        if self.strategy not in get_args(FillStrategy):
            raise ConfigError(
                f"PrefixFill.strategy is {self.strategy!r}{suggest_name(self.strategy, list(get_args(FillStrategy)))}"
            )
        if self.prefix_length < 1:
            raise ConfigError(f"PrefixFill.prefix_length is {self.prefix_length}; it must be at least 1")

    def repeated_length(self, size: int) -> int:
        wanted = {"left_pad": size, "twice": 2 * size, "iterate": self.prefix_length if size else 0}[self.strategy]
        return max(size, min(wanted, self.prefix_length))

    def _context_length(self, row: Int[np.ndarray, " T"]) -> int:
        # Where a context has filled the prefix many times, so have two of it, and three.
        return next((n for n in range(1, min(self.prefix_length, len(row))) if self._is_repeated(row, n)), 0)


class ContextRepetition(NamedTuple):
    """How contexts are reread where a model is used: filled first, and then repeated."""

    num_repeats: int = 1
    fill_strategy: FillStrategy = "left_pad"
    prefix_length: int | None = None
    """Tokens of context that the model was trained with; needed to fill."""

    def apply_to_task(self, task: Task) -> Task:
        """The task with its contexts so reread. Raises ConfigError where `fill_strategy` lacks `prefix_length`."""
        if self.fill_strategy != "left_pad" and self.prefix_length is None:
            raise ConfigError(
                f"--fill {self.fill_strategy} needs --prefix, the context tokens that the run was trained with"
            )
        filled = (
            task
            if self.prefix_length is None
            else PrefixFill(task=task, prefix_length=self.prefix_length, strategy=self.fill_strategy)
        )
        return filled if self.num_repeats == 1 else JRTPrompt(task=filled, num_repeats=self.num_repeats)

    def apply_to_context(self, context: Int[np.ndarray, " N"], task: Task) -> Int[np.ndarray, " M"]:
        """A context of the user's own, reread as that task's would be."""
        reads, changed = [], self.apply_to_task(task)
        while changed is not task and isinstance(changed, RepeatedContext):
            reads.append(changed.repeated_length)
            changed = changed.task
        for read in reversed(reads):
            context = tile_context(context, read(len(context)))
        return context


def tile_context(context: Int[np.ndarray, " N"], length: int) -> Int[np.ndarray, " M"]:
    """The last `length` tokens of a context's endless repetition, at least as many as it has."""
    return context[(np.arange(length) - length) % max(len(context), 1)]


def repeat_batch_context(batch: Batch, context_lengths: Int[np.ndarray, " B"]) -> Batch:
    """The batch with `context_lengths` tokens of context in each row instead of those it has, of which none may be fewer.

    Rows become longer by what the row that grows most needs, and padding stands at their end. Raises ValueError where a
    row is more than one document or its prefix is not how it begins.
    """
    segments, prefix = np.asarray(batch.seq.segment_ids), np.asarray(batch.seq.prefix)
    length = prefix.shape[1]
    sizes = prefix.sum(axis=1)
    if segments.max(initial=0) > 1 or not np.array_equal(prefix, np.arange(length) < sizes[:, None]):
        raise ValueError("rows to be reread must be one document each, which begins with its prefix")
    more = (context_lengths - sizes)[:, None]
    time = np.arange(length + int(more.max(initial=0)))[None]
    source = np.where(time < more, (time - more) % np.maximum(sizes[:, None], 1), time - more)
    inside = source < length
    source = np.minimum(source, length - 1)

    def moved(x: AnyArray) -> np.ndarray:
        values = np.asarray(x)
        return np.where(inside, np.take_along_axis(values, source, axis=1), 0).astype(values.dtype)

    weights = moved(batch.weights) * (time >= more)
    positions = np.broadcast_to(time.astype(np.int32), source.shape)
    seq = SeqInfo(positions, moved(segments), time < context_lengths[:, None], batch.seq.key)
    targets, term, group = (moved(x) for x in (batch.targets, batch.term, batch.group))
    return Batch(moved(batch.tokens), targets, weights.astype(np.float32), term, group, seq)
