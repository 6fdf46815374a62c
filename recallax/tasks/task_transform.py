"""The base class of tasks that change the batches of another task."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from recallax.tasks.base import Split, Task
from recallax.tasks.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class TaskTransform(Task, abc.ABC):
    """Wrap a task. Subclasses change its batches; everything else is the wrapped task's."""

    task: Task
    """The wrapped task."""

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    @property
    def terms(self) -> tuple[str, ...]:
        return self.task.terms

    @property
    def groups(self) -> tuple[str, ...]:
        return self.task.groups

    def lengths(self, split: Split) -> tuple[int, ...]:
        return self.task.lengths(split)

    def max_targets(self, split: Split, length: int) -> int:
        return self.task.max_targets(split, length)

    def prefix_lengths(self, split: Split, length: int) -> tuple[int, ...]:
        return self.task.prefix_lengths(split, length)

    @property
    def document_grid(self) -> int | None:
        return self.task.document_grid

    @property
    def encoder(self) -> Encoder | None:
        return self.task.encoder

    def data_digest(self) -> str:
        return self.task.data_digest()

    def metrics(
        self, split: Split, loss: Float[np.ndarray, " groups"], weight: Float[np.ndarray, " groups"]
    ) -> Mapping[str, float]:
        return self.task.metrics(split, loss, weight)

    def chance(self) -> float:
        return self.task.chance()
