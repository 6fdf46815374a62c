"""Execution of training steps: the states of one or more runs, and the metrics that steps return."""

import abc
from collections.abc import Sequence

from recallax.train.training_run import TrainingRun
from recallax.types import Batch


class StepExecutor(abc.ABC):
    """Advances runs that are at the same step, one step at a time."""

    runs: Sequence[TrainingRun]
    """The runs; all have the same program apart from their seeds."""

    @property
    def active_runs(self) -> list[TrainingRun]:
        """The runs that have not failed."""
        return [run for run in self.runs if run.error is None]

    @abc.abstractmethod
    def step(self, batches: Sequence[Batch]) -> None:
        """Take one optimizer step per run, on one batch per run."""

    @abc.abstractmethod
    def write_metrics(self, step: int) -> None:
        """Log the metrics of the steps since the last call, after `step` steps.

        Args:
            step: Number of steps so far.

        Raises:
            NonFiniteError: The state of the only run is frozen.
        """

    @abc.abstractmethod
    def update_states(self) -> None:
        """Set `TrainingRun.state` of every run to its current state."""


class SingleRunExecutor(StepExecutor):
    """Steps of one run.

    Args:
        run: The run.
    """

    def __init__(self, run: TrainingRun):
        self.runs = (run,)
        self._run = run

    def step(self, batches: Sequence[Batch]) -> None:
        run, (batch,) = self._run, batches
        run.state, metrics = run.program.step(run.state, batch, run.schedule.position)
        run.metrics.add(metrics, batch)

    def write_metrics(self, step: int) -> None:
        self._run.metrics.write(step, self._run.state)

    def update_states(self) -> None:
        pass
