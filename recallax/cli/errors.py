"""Exit statuses of the command line, and the one place that turns errors into messages.

| status | meaning |
|---|---|
| 0 | success |
| 1 | a run failed, or the command has a defect |
| 2 | the input is wrong |
| 75 | a run was stopped and saved; the same command resumes it |
| 79 | a run made no progress and was ended; the same command resumes it |
| 130 | Ctrl-C ended the command |
| 141 | the output was closed, as by `recallax list \\| head` |
"""

import os
import sys
import traceback
from collections.abc import Callable

from recallax.config import ConfigError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = os.EX_TEMPFAIL
"""A run was stopped by a signal, saved a checkpoint and can be resumed (75, "try again")."""
EXIT_INTERRUPTED = 130
"""Ctrl-C ended the command before there was anything to save, or was pressed twice (128 + SIGINT)."""
EXIT_BROKEN_PIPE = 141
"""The reader of the output is gone (128 + SIGPIPE)."""


def run_with_error_messages(command: Callable[[], int]) -> int:
    """Run a command, and print a message of one line for errors that its input or the machine can cause.

    Any other exception is a defect, whose traceback is printed here, where the output is escaped.

    Args:
        command: The command; returns its exit status.

    Returns:
        The exit status of the command, or of its error.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough: `recallax list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return print_error("interrupted", EXIT_INTERRUPTED)
    except ConfigError as error:
        return print_error(str(error), EXIT_USAGE)
    except Exception as error:
        status = _expected_status(error)
        if status is None:
            traceback.print_exc()
            return EXIT_FAILURE
        return print_error(str(error), status)


def print_error(message: str, status: int) -> int:
    """Print a message to the standard error.

    Args:
        message: The message, without the name of the program.
        status: The exit status.

    Returns:
        The exit status.
    """
    print(f"recallax: {message}", file=sys.stderr)
    return status


def _expected_status(error: Exception) -> int | None:
    """Return the exit status of an expected error; None for a defect. The imports are here because they need JAX."""
    from recallax.convert.key_map import WeightsError
    from recallax.models.decoding import NonFiniteLogitsError
    from recallax.models.prompts import PromptError
    from recallax.report import ReportError
    from recallax.train.checkpoint import CheckpointError
    from recallax.train.distributed import LostProcessError
    from recallax.train.log import LogError
    from recallax.train.metrics_logger import NonFiniteError
    from recallax.train.resource_checks import OutOfMemoryError
    from recallax.train.run_folder import RunFolderError
    from recallax.train.stop_signals import Interrupted

    wrong_input = (CheckpointError, LogError, OSError, PromptError, ReportError, RunFolderError, WeightsError)
    if isinstance(error, Interrupted):
        return EXIT_PREEMPTED
    if isinstance(error, LostProcessError | NonFiniteError | NonFiniteLogitsError | OutOfMemoryError):
        return EXIT_FAILURE
    return EXIT_USAGE if isinstance(error, wrong_input) else None
