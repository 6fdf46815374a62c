"""Detection of training that hangs: in a data loader, a collective, a kernel or a file system."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from statistics import median
from types import TracebackType

EXIT_HUNG = 79
"""Exit status of a process that the watchdog ended; the first one after those of sysexits.h."""
HANG_SECONDS = 60.0
"""Shortest time without a finished step that counts as a hang, where no other one is given."""
STEP_FACTOR = 10.0
"""Multiple of the median time of a step below which no time counts as a hang."""
PAUSE_SECONDS = 1800.0
"""Longest time of an evaluation or of a checkpoint."""
NUM_TIMED_STEPS = 100
"""Number of steps whose median time is used."""
MAX_POLL_SECONDS = 1.0


class Watchdog:
    """Ends the process, with the stacks of all threads, if no step finishes for a long time.

    A context manager with a thread of its own. Nothing is limited before the first step has finished, and while a step
    is compiled. The time during which the whole process is stopped, as by SIGSTOP, does not count.

    Args:
        min_seconds: Shortest time that counts as a hang. None: never end the process.
    """

    def __init__(self, min_seconds: float | None = None) -> None:
        self._min_seconds = min_seconds
        self._poll_seconds = min(MAX_POLL_SECONDS, (min_seconds or HANG_SECONDS) / 10)
        self._limit: float | None = None
        self._idle = 0.0
        self._step_seconds: deque[float] = deque(maxlen=NUM_TIMED_STEPS)
        self._last_finish: float | None = None
        self._first_start = time.monotonic()
        self._first_seconds = 0.0
        self._compiled: set[Hashable] = set()
        self._closed = threading.Event()

    def step_starts(self, program: Hashable) -> None:
        """Record that a step starts; lifts the limit while its program is compiled.

        Args:
            program: Identifies the compiled program.
        """
        if program not in self._compiled:
            self._compiled.add(program)
            self._limit = self._last_finish = None
            self._first_start = time.monotonic()

    def step_finished(self) -> None:
        """Record that a step has finished, and limit the time until the next one has."""
        now = time.monotonic()
        if self._last_finish is not None:
            self._step_seconds.append(now - self._last_finish)
        elif not self._step_seconds:
            self._first_seconds = now - self._first_start
        self._last_finish = now
        self._set_limit(self._step_limit())

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Allow more time than for a step, for an evaluation or a checkpoint."""
        self._set_limit(self._min_seconds and max(PAUSE_SECONDS, self._step_limit() or 0))
        yield
        self._last_finish = None
        self._set_limit(self._step_limit() if self._step_seconds else None)

    def __enter__(self) -> "Watchdog":
        if self._min_seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def _set_limit(self, seconds: float | None) -> None:
        self._idle, self._limit = 0.0, seconds

    def _step_limit(self) -> float | None:
        if self._min_seconds is None:
            return None
        if not self._step_seconds:  # the first step, which includes compilation, bounds the second one
            return max(self._min_seconds, 2 * self._first_seconds)
        return max(self._min_seconds, STEP_FACTOR * median(self._step_seconds))

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._poll_seconds):
            now = time.monotonic()
            self._idle += min(now - last, 2 * self._poll_seconds)  # longer if the process was stopped
            last, limit = now, self._limit
            if limit is not None and self._idle > limit:
                self._end_process(limit)

    @staticmethod
    def _end_process(limit: float) -> None:
        sys.stdout.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)
        message = (
            f"recallax: training made no progress for {limit:.0f} seconds and was ended; the stacks of all threads are "
            "above. The same command resumes from the newest checkpoint\n"
        )
        os.write(2, message.encode())
        os._exit(EXIT_HUNG)
