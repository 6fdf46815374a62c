"""Tasks made of another task: its batches, changed after they were drawn."""

import abc
from dataclasses import dataclass

from recallax.tasks.base import Split, Task


@dataclass(frozen=True, kw_only=True)
class Transform(Task, abc.ABC):
    """The task within, of which subclasses change the batches; what they do not change is that task's."""

    task: Task

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

    def prefixes(self, split: Split, length: int) -> tuple[int, ...]:
        return self.task.prefixes(split, length)

    def chance(self) -> float:
        return self.task.chance()
