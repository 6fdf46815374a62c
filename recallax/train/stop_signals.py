"""Graceful interruption of training by SIGINT and SIGTERM."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_GRACE_SECONDS = 1.0
"""Time in which the previous handler of a second signal can end the process, before it is ended without cleanup."""
REPETITION_SECONDS = 10.0
"""Time in which another signal counts as the first one: a scheduler sends SIGTERM to all processes of a job, and a
parent that received it sends SIGINT to its child. The same signal again always counts as the second."""


class Interrupted(Exception):
    """A signal stopped the run; it can be resumed."""


class SignalCounter:
    """Decides whether a signal is the second one."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._first_time = 0.0

    @property
    def received(self) -> bool:
        """True after the first signal."""
        return bool(self._numbers)

    def is_second(self, number: int) -> bool:
        """Count a signal, and return True unless it is the first one or means the same as the first one.

        Args:
            number: Number of the signal.
        """
        now = time.monotonic()
        if not self._numbers:
            self._first_time = now
        is_repetition = number not in self._numbers and now - self._first_time < REPETITION_SECONDS
        self._numbers.add(number)
        return not is_repetition


class StopSignals:
    """Records SIGINT and SIGTERM, so that the loop can stop after a step; a second signal ends the process.

    A second signal has its previous effect, such as KeyboardInterrupt. Python runs handlers in the main thread, between
    two instructions, so none runs while that thread hangs in a call of XLA. The number of every signal is therefore
    also written to a pipe (`signal.set_wakeup_fd`), and a thread that reads it ends the process if the previous handler
    has not.

    A context manager that installs signal handlers and restores the previous ones.
    """

    def __init__(self) -> None:
        self._counter = SignalCounter()
        self._previous_handlers: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._pipe = (-1, -1)
        self._closed = threading.Event()

    def stop_requested(self, step: int) -> bool:
        """Return True if any process of the run received a signal.

        Args:
            step: Number of steps so far; all processes must call this for the same steps.

        Returns:
            The same value in all processes.
        """
        if jax.process_count() == 1:
            return self._counter.received
        return bool(multihost_utils.process_allgather(np.asarray(self._counter.received)).any())

    def __enter__(self) -> "StopSignals":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._handle)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        signal.set_wakeup_fd(self._previous_wakeup)
        self._restore_handlers()
        os.close(self._pipe[1])  # ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._counter.is_second(number):
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _watch(self, pipe: int) -> None:
        counter = SignalCounter()
        while data := os.read(pipe, 1):
            number = data[0]
            if number in SIGNALS and counter.is_second(number) and not self._closed.wait(EXIT_GRACE_SECONDS):
                os.write(2, b"recallax: ended by a second signal; no checkpoint was written\n")
                os._exit(128 + number)  # the status that a shell gives to a process that a signal ended
        os.close(pipe)
