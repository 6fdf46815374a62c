"""Rows of the log from the metrics of training steps."""

import time
from typing import Any

import jax
import numpy as np

from recallax.train.log import RunLog
from recallax.train.phases import PhaseSchedule
from recallax.train.profiler import Profiler, peak_flops, step_flops
from recallax.train.program import Program
from recallax.train.progress import Progress
from recallax.train.step import MAX_NONFINITE_STREAK, StepMetrics, TrainState
from recallax.types import Batch

MIN_SECONDS = 1e-9
"""Lower bound of the time between two rows, which prevents division by zero."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class MetricsLogger:
    """Collects the metrics of steps, and transfers them from the device only when a row is due.

    Args:
        program: The program of the run.
        schedule: The phases of the run.
        log: The log.
        display: Display of the progress.
        profiler: Profiler of the run; with one, rows have the FLOPs utilization.
    """

    def __init__(
        self, program: Program, schedule: PhaseSchedule, log: RunLog, display: Progress, profiler: Profiler | None
    ):
        self._program, self._schedule, self._log, self._display = program, schedule, log, display
        self._profiler = profiler
        self._peak_flops = None if profiler is None else peak_flops()
        self.restart_clock()
        self._pending: list[StepMetrics] = []

    def restart_clock(self) -> None:
        """Start a new time interval, so that evaluation and saving do not count as training."""
        self._tokens = self._flops = self._timed = 0
        self._start_time = time.monotonic()

    def before_step(self, step: int) -> None:
        """Start or stop the profiler trace; `step` counts the steps of this process from 0."""
        if self._profiler is not None:
            self._profiler.before_step(step)

    def add(self, metrics: StepMetrics, batch: Batch) -> None:
        """Add the metrics of a step.

        Args:
            metrics: The metrics, which may still be computing.
            batch: The batch of the step; only its shapes are read.
        """
        self._pending.append(metrics)
        self._tokens += batch.tokens.size
        if self._peak_flops is not None:
            phase = self._program.phases[self._schedule.position.index]
            self._flops += step_flops(phase.config, batch.tokens.shape[1])

    def write(self, step: int, state: TrainState) -> None:
        """Write one row for the steps since the last row.

        Args:
            step: Number of steps so far.
            state: The state after them.

        Raises:
            NonFiniteError: The state is frozen.
        """
        steps: list[StepMetrics] = jax.device_get(self._pending)
        seconds = max(time.monotonic() - self._start_time, MIN_SECONDS)
        self._pending = []
        finite = [metrics for metrics in steps if metrics.finite.all()]
        speed = self._tokens / seconds
        values: dict[str, Any] = {"learning_rate": self._learning_rate(step, state), **_mean_metrics(finite)}
        values |= self._schedule.log_values(step)
        values |= {"tokens_per_second": speed, "skipped": int(state.skipped)}
        if self._peak_flops is not None:
            peak, source = self._peak_flops
            values |= {"flops_utilisation": self._flops / seconds / peak, "peak_flops": peak, "peak_source": source}
        self._log.write("train", step, values)
        shown = {name: float(values[name]) for name in ("loss", "accuracy") if name in values}
        if self._peak_flops is not None:
            shown["mfu"] = values["flops_utilisation"]
        self._display.update(step, shown, speed)
        if len(finite) < len(steps):
            self._display.note(f"{len(steps) - len(finite)} steps were skipped: {self._first_nonfinite(steps)}")
        if int(state.streak) >= MAX_NONFINITE_STREAK:
            self._raise_frozen(step, state, steps)
        self.restart_clock()

    def close(self) -> None:
        """End the profiler trace."""
        if self._profiler is not None:
            self._profiler.close()

    def _raise_frozen(self, step: int, state: TrainState, steps: list[StepMetrics]) -> None:
        leaf = self._nonfinite_parameter(state) or self._first_nonfinite(steps)
        self._log.write("event", step, {"event": "non-finite", "leaf": leaf})
        raise NonFiniteError(
            f"{MAX_NONFINITE_STREAK} steps in a row were not finite, up to step {step}: {leaf}; the parameters are "
            f"those before them. Lower optim.lr, raise optim.warmup_ratio, or inspect the batches"
        )

    def _first_nonfinite(self, steps: list[StepMetrics]) -> str:
        finite = next((metrics.finite for metrics in steps if not metrics.finite.all()), None)
        if finite is None:
            return "the streak began before this row"
        leaves = [f"the gradient or update of {name}" for name in self._program.leaf_names]
        first = [*leaves, "the loss", "the norm of the gradient"][int(np.argmin(finite))]
        return first if finite[len(leaves)] else f"the loss, and {first}" if not finite[:-2].all() else "the loss"

    def _nonfinite_parameter(self, state: TrainState) -> str | None:
        """Name a non-finite parameter. Steps keep parameters finite, so it was not finite from the start."""
        leaves = zip(self._program.leaf_names, jax.tree.leaves(state.params), strict=True)
        return next((f"the parameter {name}" for name, leaf in leaves if not np.isfinite(leaf).all()), None)

    def _learning_rate(self, step: int, state: TrainState) -> float:
        """Learning rate of the last step; the schedule does not count skipped steps."""
        return float(np.asarray(self._program.learning_rate(max(step - 1 - int(state.skipped), 0))))


def _mean_metrics(steps: list[StepMetrics]) -> dict[str, Any]:
    """Means over finite steps; empty if there are none."""
    if not steps:
        return {}
    means = {
        "loss": np.mean([metrics.loss for metrics in steps]),
        "accuracy": sum(m.accuracy.total for m in steps) / sum(m.accuracy.weight for m in steps),
        "gradient_norm": np.mean([metrics.gradient_norm for metrics in steps]),
    }
    for name in steps[0].terms:
        total, weight = (sum(metrics.terms[name][i] for metrics in steps) for i in (0, 1))
        means[f"term/{name}"] = total / weight
    return means
