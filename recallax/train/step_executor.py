"""Execution of training steps: the states of one or more runs, and the metrics that steps return."""

import abc
from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from recallax.train.step import MAX_NONFINITE_STREAK
from recallax.train.training_run import TrainingRun
from recallax.types import Batch


class StepExecutor(abc.ABC):
    """Advances runs that are at the same step, one step at a time.

    Args:
        runs: The runs; all have the same program apart from their seeds.
    """

    def __init__(self, runs: Sequence[TrainingRun]):
        self.runs = runs
        self._in_flight: deque[jax.Array] = deque()
        """`StepMetrics.finite` of the steps that may still be computing, oldest first."""

    @property
    def active_runs(self) -> list[TrainingRun]:
        """The runs that have not failed."""
        return [run for run in self.runs if run.error is None]

    def step(self, batches: Sequence[Batch]) -> None:
        """Start one optimizer step per run, on one batch per run."""
        self._in_flight.append(self._start_step(batches))

    def wait(self, step: int, max_in_flight: int = 0) -> None:
        """Wait until few steps are still computing, and stop the runs whose state is frozen.

        Args:
            step: Number of steps that have been started.
            max_in_flight: Number of steps that may still be computing.

        Raises:
            NonFiniteError: The state of the only run is frozen.
        """
        while len(self._in_flight) > max_in_flight:
            finite = np.asarray(self._in_flight.popleft())
            for run, run_finite in zip(self.runs, finite.reshape(len(self.runs), -1).all(axis=1), strict=True):
                run.nonfinite_streak = 0 if run_finite else run.nonfinite_streak + 1
        for run in self.active_runs:
            if run.nonfinite_streak >= MAX_NONFINITE_STREAK:
                self._stop(run, step)

    @abc.abstractmethod
    def _start_step(self, batches: Sequence[Batch]) -> jax.Array:
        """Start one step of every run; returns `StepMetrics.finite`, with a leading axis if there are several runs."""

    @abc.abstractmethod
    def _stop(self, run: TrainingRun, step: int) -> None:
        """Log that the state of a run is frozen, after `step` steps, and stop it or raise its NonFiniteError."""

    @abc.abstractmethod
    def write_metrics(self, step: int) -> None:
        """Log the metrics of the steps since the last call, after `step` steps."""

    @abc.abstractmethod
    def update_states(self) -> None:
        """Set `TrainingRun.state` of every run to its current state."""


class SingleRunExecutor(StepExecutor):
    """Steps of one run.

    Args:
        run: The run.
    """

    def __init__(self, run: TrainingRun):
        super().__init__((run,))
        self._run = run

    def _start_step(self, batches: Sequence[Batch]) -> jax.Array:
        run, (batch,) = self._run, batches
        run.state, metrics = run.program.step(run.state, batch, run.schedule.position)
        run.metrics.add(metrics, batch)
        return metrics.finite

    def _stop(self, run: TrainingRun, step: int) -> None:
        raise run.log_frozen(step)

    def write_metrics(self, step: int) -> None:
        self._run.metrics.write(step, self._run.state)

    def update_states(self) -> None:
        pass
