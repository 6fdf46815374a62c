"""How far a run is: a live bar on a terminal, plain lines elsewhere.

Both show the same; choose with `make_progress`. Text that came from a config or an error is shown without control
characters, so a name cannot move the cursor or retitle the window.
"""

import abc
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

type Console = Any
"""rich's, which is imported only for a terminal."""


class Progress(abc.ABC):
    """A display of one run; a context manager."""

    @abc.abstractmethod
    def show_compiling(self, what: str) -> None:
        """Say that something is being compiled; the next `update` ends it."""

    @abc.abstractmethod
    def update(self, step: int, metrics: Mapping[str, int | float], tokens_per_second: int | float) -> None:
        """Show the run after `step` optimizer steps."""

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Say something once: a checkpoint, a skipped step."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the display; what it showed last stays. Closing twice does nothing."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_progress(steps: int) -> Progress:
    """The display that suits standard output: live on a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        return PlainProgress(steps)
    import rich

    return LiveProgress(steps, rich.get_console())


class PlainProgress(Progress):
    """One line per call."""

    def __init__(self, steps: int) -> None:
        self._remaining_time = _RemainingTime(steps)

    def show_compiling(self, what: str) -> None:
        self.note(f"compiling {what}")

    def update(self, step: int, metrics: Mapping[str, int | float], tokens_per_second: int | float) -> None:
        left = self._remaining_time.remaining(step)
        self.note(
            f"step {step}/{self._remaining_time.steps}  {_format_metrics(metrics, tokens_per_second)}  {left} left"
        )

    def note(self, text: str) -> None:
        print(printable(text), flush=True)

    def close(self) -> None:
        pass


class LiveProgress(Progress):
    """A bar that stays at the bottom; notes scroll above it."""

    def __init__(self, steps: int, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        # markup=False: a metric may be called anything, also something that rich would take for a style
        text = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("status", "left")]
        self._bar = RichProgress(BarColumn(20), MofNCompleteColumn(), *text, console=console)
        self._task = self._bar.add_task("", total=steps, status="starting", left="")
        self._remaining_time = _RemainingTime(steps)
        self._bar.start()

    def show_compiling(self, what: str) -> None:
        self._bar.update(self._task, status=printable(f"compiling {what}"), refresh=True)

    def update(self, step: int, metrics: Mapping[str, int | float], tokens_per_second: int | float) -> None:
        status, left = (
            printable(_format_metrics(metrics, tokens_per_second)),
            f"{self._remaining_time.remaining(step)} left",
        )
        self._bar.update(self._task, completed=step, status=status, left=left, refresh=True)

    def note(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class _RemainingTime:
    """Time left, from the steps since the first update: compilation and the steps before a resume do not count."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._first_update: tuple[int, float] | None = None

    def remaining(self, step: int) -> str:
        now = time.monotonic()
        first_step, first_time = self._first_update = self._first_update or (step, now)
        if step >= self.steps:
            return "0:00"
        if step == first_step:
            return "?"
        return _format_duration((now - first_time) / (step - first_step) * (self.steps - step))


def printable(text: str) -> str:
    """The text on one line, every control or format character replaced by a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def _format_metrics(metrics: Mapping[str, int | float], tokens_per_second: int | float) -> str:
    shown = [f"{name} {float(value):.4g}" for name, value in metrics.items()]
    return "  ".join([*shown, f"{_format_number(tokens_per_second)} tokens/s"])


def _format_number(number: int | float) -> str:
    """Three digits and a suffix: 1.23k, 45.6M."""
    if not math.isfinite(number) or number < 1000:
        return f"{number:.3g}"
    power = min(int(math.log10(number) // 3), 4)
    return f"{number / 1000**power:.3g}{' kMGT'[power]}"


def _format_duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
