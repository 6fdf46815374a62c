"""Progress of a sweep: a live table on a terminal, one line per event elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from recallax.external_file import printable
from recallax.sweep.backends.backend import EXIT_IN_USE
from recallax.terminal import live_console, live_display
from recallax.train.log import parse_number, read_last_row

MAX_DESCRIPTION_LENGTH = 200
"""Characters of a trial's labels that are shown."""
STOPPED = {
    os.EX_TEMPFAIL: "stopped, will be resumed",
    EXIT_IN_USE: "not started, because another process is running it",
}
"""Texts for exit statuses of workers that have not failed."""


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
        self._out, self._live, self._display = out, None, ExitStack()
        self._running: dict[str, _RunningTrial] = {}
        self._running_elsewhere: set[str] = set()
        self._num_ended = self._num_trials = 0

    def __enter__(self) -> "SweepDisplay":
        console = live_console()
        if console is not None:
            import rich.live

            self._live = rich.live.Live(console=console, refresh_per_second=2)
            self._display.enter_context(live_display(self._live))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self.refresh()
        self._display.close()

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
        self._running[name] = _RunningTrial(_describe(labels), steps, time.monotonic())

    def trial_running_elsewhere(self, name: str, labels: Mapping[str, Any], process: str) -> None:
        """Announce, once, that the sweep waits for a trial that another process is running.

        Args:
            name: Fingerprint of the trial's config.
            labels: Labels of the trial.
            process: The process.
        """
        if name not in self._running_elsewhere:
            self._running_elsewhere.add(name)
            self.print_line(f"{_describe(labels)}: running in {process}; waiting for it")

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
            valid = row.get("valid")
            accuracy = _format_accuracy(valid.get("accuracy") if isinstance(valid, Mapping) else None, 4)
            outcome = f"valid accuracy {accuracy or 'unknown'}"
        else:
            outcome = STOPPED.get(status, "failed")
        seconds = time.monotonic() - trial.start_time
        self.print_line(f"[{self._num_ended}/{self._num_trials}] {trial.description}: {outcome} in {seconds:.0f} s")

    def print_line(self, text: str) -> None:
        """Print a line, above the table if there is one."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(printable(text), markup=False, emoji=False)

    def refresh(self) -> None:
        """Update the table from the logs of the running trials."""
        if self._live is None:
            return
        import rich.table
        import rich.text

        title = f"{self._num_ended} of {self._num_trials} ended"
        table = rich.table.Table("run", "step", "accuracy", "seconds", title=title)
        for name, trial in list(self._running.items()):
            step, accuracy = self._latest_metrics(name)
            progress = "waiting" if step is None else f"{step}/{trial.steps}"
            seconds = f"{time.monotonic() - trial.start_time:.0f}"
            # A plain text: labels may look like styles of rich.
            table.add_row(rich.text.Text(trial.description), progress, accuracy, seconds)
        self._live.update(table)

    def _latest_metrics(self, name: str) -> tuple[int | None, str]:
        """Return the step and the accuracy of the last complete "train" row of a log; no step without a log."""
        path = self._out / name / "log.jsonl"
        if not path.exists():
            return None, ""
        row = read_last_row(path, "train") or {}
        return row.get("step", 0), _format_accuracy(row.get("accuracy"), 3)


def _describe(labels: Mapping[str, Any]) -> str:
    """Return the labels of a trial as a line that can be printed on any terminal."""
    text = " ".join(f"{key} {value}" for key, value in labels.items())
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text[:MAX_DESCRIPTION_LENGTH]).encode(encoding, "backslashreplace").decode(encoding)


def _format_accuracy(value: Any, digits: int) -> str:
    """Format an accuracy of a row, which may be missing or anything; returns "" if it is not a number."""
    number = parse_number(value)
    if number is None:
        return ""
    return f"{number:.{digits}g}" if abs(number) > 1 else f"{number:.{digits}f}"
