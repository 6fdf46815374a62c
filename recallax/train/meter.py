"""What the steps of a run report, as rows of its log."""

import time
from typing import Any

import jax
import numpy as np

from recallax.train.curriculum import Course
from recallax.train.log import RunLog
from recallax.train.profile import Profile, peak_flops, step_flops
from recallax.train.program import Program
from recallax.train.progress import Progress
from recallax.train.step import MAX_STREAK, StepReport, TrainState
from recallax.types import Batch


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Meter:
    """Collects what steps report, without waiting for the device until a row is due."""

    def __init__(self, program: Program, course: Course, log: RunLog, display: Progress, profile: Profile | None):
        self._program, self._course, self._log, self._display = program, course, log, display
        self._profile = profile
        self._peak = None if profile is None else peak_flops()
        self.restart()
        self._reports: list[StepReport] = []

    def restart(self) -> None:
        """Start the clock anew, so that evaluation and saving do not count as training."""
        self._tokens = self._flops = self._timed = 0
        self._clock = time.monotonic()

    def before(self, step: int) -> None:
        if self._profile is not None:
            self._profile.at(step)

    def add(self, report: StepReport, batch: Batch) -> None:
        self._reports.append(report)
        self._tokens += batch.tokens.size
        if self._peak is not None:
            lesson = self._program.lessons[self._course.standing.stage]
            self._flops += step_flops(lesson.config, batch.tokens.shape[1])

    def write(self, step: int, state: TrainState) -> None:
        """One row for the steps since the last; raises NonFiniteError if the state is frozen."""
        reports: list[StepReport] = jax.device_get(self._reports)
        seconds = max(time.monotonic() - self._clock, 1e-9)
        self._reports = []
        good = [r for r in reports if r.finite.all()]
        values: dict[str, Any] = {"learning_rate": self._rate(step, state)}
        if good:
            values["loss"] = np.mean([r.loss for r in good])
            values["accuracy"] = sum(r.accuracy.total for r in good) / sum(r.accuracy.weight for r in good)
            values["gradient_norm"] = np.mean([r.gradient_norm for r in good])
            for name in good[0].terms:
                total, weight = (sum(r.terms[name][i] for r in good) for i in (0, 1))
                values[f"term/{name}"] = total / weight
        if self._program.config.curriculum is not None:
            values["stage"] = self._course.standing.stage
            values |= {f"ramp/{gate}": value for gate, value in self._course.ramps(step).items()}
        speed = self._tokens / seconds
        values |= {"tokens_per_second": speed, "skipped": int(state.skipped)}
        if self._peak is not None:
            peak, source = self._peak
            values |= {"flops_utilisation": self._flops / seconds / peak, "peak_flops": peak, "peak_source": source}
        self._log.write("train", step, values)
        shown = {name: float(values[name]) for name in ("loss", "accuracy") if name in values}
        if self._peak is not None:
            shown["mfu"] = values["flops_utilisation"]
        self._display.update(step, shown, speed)
        if len(good) < len(reports):
            self._display.note(f"{len(reports) - len(good)} steps were skipped: {self._first_bad(reports)}")
        if int(state.streak) >= MAX_STREAK:
            bad = self._bad_parameter(state) or self._first_bad(reports)
            self._log.write("event", step, {"event": "non-finite", "leaf": bad})
            raise NonFiniteError(
                f"{MAX_STREAK} steps in a row were not finite, up to step {step}: {bad}; the parameters are those "
                f"before them. Lower optim.lr, raise optim.warmup, or look at the batches"
            )
        self.restart()

    def close(self) -> None:
        if self._profile is not None:
            self._profile.close()

    def _first_bad(self, reports: list[StepReport]) -> str:
        bad = next((r.finite for r in reports if not r.finite.all()), None)
        if bad is None:
            return "the streak began before this row"
        leaves = [f"the gradient or update of {name}" for name in self._program.leaf_names]
        first = [*leaves, "the loss", "the norm of the gradient"][int(np.argmin(bad))]
        return first if bad[len(leaves)] else f"the loss, and {first}" if not bad[:-2].all() else "the loss"

    def _bad_parameter(self, state: TrainState) -> str | None:
        """Steps keep parameters finite; one that is not was so from the start, and makes every gradient non-finite."""
        leaves = zip(self._program.leaf_names, jax.tree.leaves(state.params), strict=True)
        return next((f"the parameter {name}" for name, leaf in leaves if not np.isfinite(leaf).all()), None)

    def _rate(self, step: int, state: TrainState) -> float:
        """Learning rate of the last step: the schedule counts the steps that were taken, not those skipped."""
        return float(np.asarray(self._program.learning_rate(max(step - 1 - int(state.skipped), 0))))
