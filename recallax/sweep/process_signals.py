"""Ends of a sweep before its runs are done: signals to the sweep, and workers whose parent process is gone."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from recallax.train.stop_signals import Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
"""Operation of Linux's `prctl`: the signal that a process receives when its parent ends."""
WATCH_SECONDS = 1.0
"""Seconds between checks of the parent where the kernel sends no such signal."""


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise `Interrupted` out of a block on SIGINT, SIGTERM or SIGHUP; a second signal has its previous effect.

    Inside the block the exception is a KeyboardInterrupt, which code that handles every `Exception` lets pass. A signal
    that the process ignores remains ignored, such as SIGHUP under nohup. Outside the main thread, which alone may
    handle signals, only a KeyboardInterrupt is converted.

    Raises:
        Interrupted: A signal arrived.
    """
    previous: dict[int, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, previous[number])
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a handler that Python cannot restore
                previous[number] = signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("the sweep was stopped; run the same command again to resume") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_parent(parent: int) -> None:
    """Let this process receive SIGTERM when its parent ends, for whatever reason.

    The kernel sends the signal on Linux. Elsewhere a thread watches the parent.

    Args:
        parent: Process id of the parent, which it has passed. The parent may have ended already.
    """
    if not _request_parent_death_signal():
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    elif os.getppid() != parent:  # it ended before the request
        os.kill(os.getpid(), signal.SIGTERM)


def _request_parent_death_signal() -> bool:
    """Ask the kernel for SIGTERM when the parent ends; returns False if it has no such signal."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
