"""The interface of sweep backends, and what the backends share."""

import abc
import os
import sys
from pathlib import Path

from recallax.config import require_at_least

DEFAULT_QUEUE_SIZE = 64
"""Number of runs that a sweep keeps in the queue of a cluster. The cluster decides how many of them run at a time."""

EXIT_IN_USE = os.EX_UNAVAILABLE
"""Exit status of a worker that found a run folder in use by another process."""


class Backend(abc.ABC):
    """Runs worker processes. The sweep calls `run` from `workers` threads at the same time."""

    workers: int
    """Number of concurrent calls of `run`."""

    @abc.abstractmethod
    def run(self, arguments: list[str], log: Path) -> int:
        """Run `recallax.sweep.worker` and wait until it ends.

        Args:
            arguments: Arguments of the worker.
            log: File to which the worker's output is appended.

        Returns:
            The worker's exit status. `os.EX_TEMPFAIL`: the run was stopped and saved, and can be resumed.
            `EXIT_IN_USE`: another process uses the folder of the run.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Stop the running workers and start no more. From then on, `run` returns `os.EX_TEMPFAIL`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnect from the cluster. No worker may be running."""


def worker_command(arguments: list[str]) -> list[str]:
    """Return the command line of a worker that this process starts. The worker ends with this process.

    Args:
        arguments: Arguments of `recallax.sweep.worker`.
    """
    return [sys.executable, "-m", "recallax.sweep.worker", str(os.getpid()), *arguments]


def thread_environment(num_cores: int) -> dict[str, str]:
    """Return environment variables that limit the threads of a process.

    Args:
        num_cores: Number of threads that compute.
    """
    return dict.fromkeys(("PJRT_NPROC", "NPROC", "OMP_NUM_THREADS"), str(num_cores))


def queue_size(workers: int | None) -> int:
    """Return the number of runs that a sweep keeps in a cluster's queue.

    Args:
        workers: The requested number; None for `DEFAULT_QUEUE_SIZE`.

    Raises:
        ConfigError: The number is below 1.
    """
    require_at_least(1, "", f"or omitted for {DEFAULT_QUEUE_SIZE}", workers=workers)
    return DEFAULT_QUEUE_SIZE if workers is None else workers
