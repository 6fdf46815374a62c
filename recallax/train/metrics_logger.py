"""Rows of the log from the metrics of training steps."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from recallax.train.log import RunLog
from recallax.train.loss_spikes import LossSpikes
from recallax.train.metric_sums import MetricSums
from recallax.train.phases import PhaseSchedule
from recallax.train.profiler import Profiler, peak_flops, step_flops
from recallax.train.program import Program
from recallax.train.progress import Progress
from recallax.train.step import StepMetrics, TrainState
from recallax.types import Batch

MIN_SECONDS = 1e-9
"""Lower bound of the time between two rows, which prevents division by zero."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class MetricsLogger:
    """Collects the metrics of steps, and transfers them from the device only when a row or a checkpoint is due.

    Args:
        program: The program of the run.
        schedule: The phases of the run.
        log: The log.
        display: Display of the progress.
        profiler: Profiler of the run; with one, rows have the FLOPs utilization.
        step: Number of steps before the first one that is added.
        metadata: Metadata of the checkpoint from which the run resumes, with what `checkpoint_metadata` returned.
    """

    def __init__(
        self,
        program: Program,
        schedule: PhaseSchedule,
        log: RunLog,
        display: Progress,
        profiler: Profiler | None,
        step: int,
        metadata: Mapping[str, Any],
    ):
        self._program, self._schedule, self._log, self._display = program, schedule, log, display
        self._profiler = profiler
        self._peak_flops = None if profiler is None else peak_flops()
        self.restart_clock()
        self._pending: list[StepMetrics] = []
        recorded = metadata.get("metrics", {})  # absent in checkpoints of earlier versions
        self._collected_step = step
        self._sums, self._spikes = MetricSums(recorded.get("sums")), LossSpikes(recorded.get("losses", ()))

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
        """
        self._collect()
        seconds = max(time.monotonic() - self._start_time, MIN_SECONDS)
        speed = self._tokens / seconds
        values: dict[str, Any] = {"learning_rate": self._learning_rate(step, state), **self._sums.means()}
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
        if self._sums.num_skipped:
            self._display.note(f"{self._sums.num_skipped} steps were skipped: {self._sums.skip_reason}")
        self._sums = MetricSums()
        self.restart_clock()

    def write_frozen(self, step: int, state: TrainState) -> str:
        """Write the last row of a run whose state is frozen, and the "non-finite" event.

        Args:
            step: Number of steps so far.
            state: The frozen state.

        Returns:
            Name of the value that was not finite.
        """
        self._collect()
        leaf = self._nonfinite_parameter(state) or self._sums.skip_reason or "the streak began before this row"
        self.write(step, state)
        self._log.write("event", step, {"event": "non-finite", "leaf": leaf})
        return leaf

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Return JSON values from which a resumed run continues the row that is not complete yet."""
        self._collect()
        return {"metrics": {"sums": self._sums.to_json(), "losses": self._spikes.to_json()}}

    def close(self) -> None:
        """End the profiler trace."""
        if self._profiler is not None:
            self._profiler.close()

    def _collect(self) -> None:
        """Transfer the metrics of the steps since the last call, and log the loss spikes among them."""
        steps: list[StepMetrics] = jax.device_get(self._pending)
        self._pending = []
        for metrics in steps:
            self._collected_step += 1
            if not metrics.finite.all():
                self._sums.add_skipped(self._first_nonfinite(np.asarray(metrics.finite)))
                continue
            self._sums.add(metrics)
            if (spike := self._spikes.add(float(metrics.loss))) is not None:
                self._log.write("event", self._collected_step, {"event": "loss-spike", **spike._asdict()})
                text = f"loss spike: {spike.loss:.4g}, with a running median of {spike.median:.4g}"
                self._display.note(f"step {self._collected_step}: {text}")

    def _first_nonfinite(self, finite: np.ndarray) -> str:
        """Describe the first value that `StepMetrics.finite` marks."""
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
