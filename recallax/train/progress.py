"""Display of the progress of a run: a live bar on a terminal, plain lines elsewhere.

Both show the same; `make_progress` selects one. Control characters in texts from configs and errors are escaped, so
that a name cannot move the cursor or change the title of the window.
"""

import abc
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType

from recallax.external_file import printable
from recallax.terminal import Console, live_console, live_display


class Progress(abc.ABC):
    """Display of one run; a context manager that closes it."""

    @abc.abstractmethod
    def show_compiling(self, what: str) -> None:
        """Show that a function is being compiled, until the next `update`; `what` names it."""

    @abc.abstractmethod
    def update(self, step: int, metrics: Mapping[str, int | float], tokens_per_second: int | float) -> None:
        """Show metrics.

        Args:
            step: Number of optimizer steps so far.
            metrics: Values by name.
            tokens_per_second: Training speed.
        """

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Print a line, such as the metrics of an evaluation."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the display and leave its last output; closing twice does nothing."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_progress(steps: int) -> Progress:
    """Return a live display if standard output is a terminal, else a plain one; `steps` is the length of the run."""
    console = live_console()
    return PlainProgress(steps) if console is None else LiveProgress(steps, console)


class PlainProgress(Progress):
    """Prints one line per call."""

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
    """A bar at the bottom of the terminal, with notes scrolling above it."""

    def __init__(self, steps: int, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        # markup=False: the name of a metric may look like a style of rich
        text = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("status", "left")]
        self._bar = RichProgress(BarColumn(20), MofNCompleteColumn(), *text, console=console)
        self._task = self._bar.add_task("", total=steps, status="starting", left="")
        self._remaining_time = _RemainingTime(steps)
        self._display = ExitStack()
        self._display.enter_context(live_display(self._bar))

    def show_compiling(self, what: str) -> None:
        self._bar.update(self._task, status=printable(f"compiling {what}"), refresh=True)

    def update(self, step: int, metrics: Mapping[str, int | float], tokens_per_second: int | float) -> None:
        status = printable(_format_metrics(metrics, tokens_per_second))
        left = f"{self._remaining_time.remaining(step)} left"
        self._bar.update(self._task, completed=step, status=status, left=left, refresh=True)

    def note(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        self._display.close()


class _RemainingTime:
    """Estimate of the remaining time, from the steps since the first update, without compilation and resumed steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._first_update: tuple[int, float] | None = None

    def remaining(self, step: int) -> str:
        """Return the remaining time as text; "?" at the first update."""
        now = time.monotonic()
        first_step, first_time = self._first_update = self._first_update or (step, now)
        if step >= self.steps:
            return "0:00"
        if step == first_step:
            return "?"
        return _format_duration((now - first_time) / (step - first_step) * (self.steps - step))


def _format_metrics(metrics: Mapping[str, int | float], tokens_per_second: int | float) -> str:
    shown = [f"{name} {float(value):.4g}" for name, value in metrics.items()]
    return "  ".join([*shown, f"{_format_number(tokens_per_second)} tokens/s"])


def _format_number(number: int | float) -> str:
    """Format with three digits and a suffix: 1.23k, 45.6M."""
    if not math.isfinite(number) or number < 1000:
        return f"{number:.3g}"
    power = min(int(math.log10(number) // 3), 4)
    return f"{number / 1000**power:.3g}{' kMGT'[power]}"


def _format_duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
