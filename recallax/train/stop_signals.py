"""Runs that are asked to stop, and go on another time."""

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was asked to stop."""


class StopSignals:
    """Turns SIGINT and SIGTERM into a question that the loop asks after every step; a second signal ends at once."""

    def __init__(self) -> None:
        self._requested = False
        self._previous_handlers: dict[int, Any] = {}

    def stop_requested(self, step: int) -> bool:
        """Whether to save and stop now; all processes of a run get the same answer for the same step."""
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
