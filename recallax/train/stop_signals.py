"""Graceful interruption of training by SIGINT and SIGTERM."""

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal stopped the run; it can be resumed."""


class StopSignals:
    """Records SIGINT and SIGTERM, so that the loop can stop after a step; a second signal has its previous effect.

    A context manager that installs signal handlers and restores the previous ones.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous_handlers: dict[int, Any] = {}

    def stop_requested(self, step: int) -> bool:
        """Return True if any process of the run received a signal.

        Args:
            step: Number of steps so far; all processes must call this for the same steps.

        Returns:
            The same value in all processes.
        """
        if jax.process_count() == 1:
            return self._requested
        return bool(multihost_utils.process_allgather(np.asarray(self._requested)).any())

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(number, self._previous_handlers[number])
