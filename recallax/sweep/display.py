"""Progress of a sweep: a live table on a terminal, one line per event elsewhere."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from recallax.train.progress import printable


class _RunningTrial(NamedTuple):
    description: str
    steps: int
    start_time: float


class SweepDisplay:
    """Context manager that prints events, and on a terminal also a table of the running trials.

    Args:
        out: Folder of the sweep, from whose logs the table is filled.
    """

    def __init__(self, out: Path):
        self._out, self._live = out, None
        self._running: dict[str, _RunningTrial] = {}
        self._num_ended = self._num_trials = 0

    def __enter__(self) -> "SweepDisplay":
        if sys.stdout.isatty():
            import rich.live

            self._live = rich.live.Live(refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self.refresh()
            self._live.stop()

    def start_stage(self, stage: int, stages: int, trials: int) -> None:
        """Announce the trials that a stage returned.

        Args:
            stage: Number of the stage, from 1.
            stages: Number of stages.
            trials: Number of trials.
        """
        self._num_ended, self._num_trials = 0, trials
        self.print_line(f"{self._out}: stage {stage} of {stages}, {trials} runs")

    def trial_started(self, name: str, labels: Mapping[str, Any], steps: int) -> None:
        """Add a trial to the table. May be called from any thread.

        Args:
            name: Fingerprint of the trial's config.
            labels: Labels of the trial.
            steps: Number of optimizer steps that it trains for.
        """
        description = printable(" ".join(f"{key} {value}" for key, value in labels.items()))
        self._running[name] = _RunningTrial(description, steps, time.monotonic())

    def trial_ended(self, name: str, status: int, row: Mapping[str, Any] | None) -> None:
        """Announce the end of a trial.

        Args:
            name: Fingerprint of the trial's config.
            status: Exit status of its worker.
            row: Its result; None if it failed or was stopped.
        """
        trial = self._running.pop(name)
        self._num_ended += 1
        if row is not None:
            outcome = f"valid accuracy {row['valid']['accuracy']:.4f}"
        else:
            outcome = "stopped, will be resumed" if status == os.EX_TEMPFAIL else "failed"
        seconds = time.monotonic() - trial.start_time
        self.print_line(f"[{self._num_ended}/{self._num_trials}] {trial.description}: {outcome} in {seconds:.0f} s")

    def print_line(self, text: str) -> None:
        """Print a line, above the table if there is one."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, markup=False)

    def refresh(self) -> None:
        """Update the table from the logs of the running trials."""
        if self._live is None:
            return
        import rich.table

        title = f"{self._num_ended} of {self._num_trials} ended"
        table = rich.table.Table("run", "step", "accuracy", "seconds", title=title)
        for name, trial in list(self._running.items()):
            step, accuracy = self._latest_metrics(name)
            progress = "waiting" if step is None else f"{step}/{trial.steps}"
            table.add_row(trial.description, progress, accuracy, f"{time.monotonic() - trial.start_time:.0f}")
        self._live.update(table)

    def _latest_metrics(self, name: str) -> tuple[int | None, str]:
        """Return the step and the accuracy of the last complete "train" row of a log; no step without a log."""
        path = self._out / name / "log.jsonl"
        if not path.exists():
            return None, ""
        for line in reversed(path.read_text().splitlines()):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["kind"] == "train":
                return row["step"], f"{float(row['accuracy']):.3f}"
        return 0, ""
