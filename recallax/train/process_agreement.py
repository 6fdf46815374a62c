"""Decisions that all processes of a run take together, so that none waits for one that has stopped."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

MAX_ERROR_LENGTH = 300
"""Characters of an error that are shown; the texts of orbax and tensorstore have kilobytes."""
OTHER_PROCESS = "it failed in another process"
"""Cause of a failure that only another process knows."""


def all_processes_agree(verdict: bool) -> bool:
    """Return True if `verdict` is True in every process; also a barrier between them."""
    if jax.process_count() == 1:
        return verdict
    return bool(multihost_utils.process_allgather(np.asarray(verdict)).all())


def try_in_all_processes[T](action: Callable[[], T]) -> tuple[T | None, str]:
    """Take an action in all processes.

    Args:
        action: Returns a value other than None. It must not wait for other processes, because it may fail in one only.

    Returns:
        The result and an empty string; or None and the cause in all processes, if it failed in one of them.
    """
    result, cause = None, OTHER_PROCESS
    try:
        result = action()
    except Exception as error:  # a damaged file makes orbax raise nearly every type
        cause = one_line(error)
    return (result, "") if all_processes_agree(result is not None) else (None, cause)


def one_line(error: Exception) -> str:
    """Return the type and the start of the text of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_ERROR_LENGTH]
