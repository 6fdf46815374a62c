"""How far a sweep is: a live table on a terminal, a line per event elsewhere."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from recallax.train.progress import printable


class SweepDisplay:
    """A context manager; the table shows running cells with their step, and the last that ended."""

    def __init__(self, out: Path):
        self._out, self._live, self._title = out, None, ""
        self._running: dict[str, tuple[str, int, float]] = {}
        self._ended: list[tuple[str, str]] = []
        self._count = self._total = 0

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
        """A round of cells starts."""
        self._count, self._total = 0, trials
        self._title = f"{self._out}: stage {stage} of {stages}, {trials} runs"
        self.note(self._title)

    def trial_started(self, name: str, labels: Mapping[str, Any], steps: int) -> None:
        """A cell's process starts, in whichever thread."""
        text = printable(" ".join(f"{key} {value}" for key, value in labels.items()))
        self._running[name] = (text, steps, time.monotonic())

    def trial_ended(self, name: str, status: int, row: Mapping[str, Any] | None) -> None:
        """A cell ended, with its row, stopped by another, or in failure."""
        text, _, begun = self._running.pop(name)
        self._count += 1
        without = "stopped, and will go on" if status == os.EX_TEMPFAIL else "failed"
        told = without if row is None else f"valid accuracy {row['valid']['accuracy']:.4f}"
        told += f" in {time.monotonic() - begun:.0f} s"
        self._ended.append((text, told))
        self.note(f"[{self._count}/{self._total}] {text}: {told}")

    def note(self, text: str) -> None:
        """Say something once."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, markup=False)

    def refresh(self) -> None:
        """Draw the table anew."""
        if self._live is None:
            return
        import rich.table

        table = rich.table.Table("run", "step", "accuracy", "seconds", title=f"{self._count} of {self._total} ended")
        for name, (text, steps, begun) in list(self._running.items()):
            step, accuracy = self._latest_metrics(name)
            place = "waiting" if step is None else f"{step}/{steps}"
            table.add_row(text, place, accuracy, f"{time.monotonic() - begun:.0f}")
        self._live.update(table)

    def _latest_metrics(self, name: str) -> tuple[int | None, str]:
        """Step and accuracy of the last whole train row of a log; no step before there is a log."""
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
