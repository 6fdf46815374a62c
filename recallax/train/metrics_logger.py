"""What the steps of a run report, as rows of its log."""

import time
from typing import Any

import jax
import numpy as np

from recallax.train.curriculum.stages import CurriculumRunner
from recallax.train.log import RunLog
from recallax.train.profiler import Profiler, peak_flops, step_flops
from recallax.train.program import Program
from recallax.train.progress import Progress
from recallax.train.step import MAX_NONFINITE_STREAK, StepMetrics, TrainState
from recallax.types import Batch


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class MetricsLogger:
    """Collects what steps report, without waiting for the device until a row is due."""

    def __init__(
        self, program: Program, curriculum: CurriculumRunner, log: RunLog, display: Progress, profiler: Profiler | None
    ):
        self._program, self._curriculum, self._log, self._display = program, curriculum, log, display
        self._profiler = profiler
        self._peak_flops = None if profiler is None else peak_flops()
        self.restart_clock()
        self._pending: list[StepMetrics] = []

    def restart_clock(self) -> None:
        """Start the clock anew, so that evaluation and saving do not count as training."""
        self._tokens = self._flops = self._timed = 0
        self._start_time = time.monotonic()

    def before_step(self, step: int) -> None:
        if self._profiler is not None:
            self._profiler.before_step(step)

    def add(self, metrics: StepMetrics, batch: Batch) -> None:
        self._pending.append(metrics)
        self._tokens += batch.tokens.size
        if self._peak_flops is not None:
            lesson = self._program.stages[self._curriculum.state.stage_index]
            self._flops += step_flops(lesson.config, batch.tokens.shape[1])

    def write(self, step: int, state: TrainState) -> None:
        """One row for the steps since the last; raises NonFiniteError if the state is frozen."""
        reports: list[StepMetrics] = jax.device_get(self._pending)
        seconds = max(time.monotonic() - self._start_time, 1e-9)
        self._pending = []
        good = [r for r in reports if r.finite.all()]
        values: dict[str, Any] = {"learning_rate": self._learning_rate(step, state)}
        if good:
            values["loss"] = np.mean([r.loss for r in good])
            values["accuracy"] = sum(r.accuracy.total for r in good) / sum(r.accuracy.weight for r in good)
            values["gradient_norm"] = np.mean([r.gradient_norm for r in good])
            for name in good[0].terms:
                total, weight = (sum(r.terms[name][i] for r in good) for i in (0, 1))
                values[f"term/{name}"] = total / weight
        if self._program.config.curriculum is not None:
            values["stage"] = self._curriculum.state.stage_index
            values |= {f"ramp/{gate}": value for gate, value in self._curriculum.ramp_values(step).items()}
        speed = self._tokens / seconds
        values |= {"tokens_per_second": speed, "skipped": int(state.skipped)}
        if self._peak_flops is not None:
            peak, source = self._peak_flops
            values |= {"flops_utilisation": self._flops / seconds / peak, "peak_flops": peak, "peak_source": source}
        self._log.write("train", step, values)
        shown = {name: float(values[name]) for name in ("loss", "accuracy") if name in values}
        if self._peak_flops is not None:
            shown["mfu"] = values["flops_utilisation"]
        self._display.update(step, shown, speed)
        if len(good) < len(reports):
            self._display.note(f"{len(reports) - len(good)} steps were skipped: {self._first_nonfinite(reports)}")
        if int(state.streak) >= MAX_NONFINITE_STREAK:
            bad = self._nonfinite_parameter(state) or self._first_nonfinite(reports)
            self._log.write("event", step, {"event": "non-finite", "leaf": bad})
            raise NonFiniteError(
                f"{MAX_NONFINITE_STREAK} steps in a row were not finite, up to step {step}: {bad}; the parameters are those "
                f"before them. Lower optim.lr, raise optim.warmup_ratio, or look at the batches"
            )
        self.restart_clock()

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.close()

    def _first_nonfinite(self, reports: list[StepMetrics]) -> str:
        bad = next((r.finite for r in reports if not r.finite.all()), None)
        if bad is None:
            return "the streak began before this row"
        leaves = [f"the gradient or update of {name}" for name in self._program.leaf_names]
        first = [*leaves, "the loss", "the norm of the gradient"][int(np.argmin(bad))]
        return first if bad[len(leaves)] else f"the loss, and {first}" if not bad[:-2].all() else "the loss"

    def _nonfinite_parameter(self, state: TrainState) -> str | None:
        """Steps keep parameters finite; one that is not was so from the start, and makes every gradient non-finite."""
        leaves = zip(self._program.leaf_names, jax.tree.leaves(state.params), strict=True)
        return next((f"the parameter {name}" for name, leaf in leaves if not np.isfinite(leaf).all()), None)

    def _learning_rate(self, step: int, state: TrainState) -> float:
        """Learning rate of the last step: the schedule counts the steps that were taken, not those skipped."""
        return float(np.asarray(self._program.learning_rate(max(step - 1 - int(state.skipped), 0))))
