"""Where the runs of a sweep are trained: on this machine here; on Ray and SLURM in the files beside this one."""

import abc
import os
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from recallax.config import ConfigError
from recallax.train.log import available_cores

DEFAULT_QUEUE_SIZE = 64
"""Runs that a sweep has in the queue of a cluster at a time."""


class Backend(abc.ABC):
    """Trains cells, `workers` at a time: `run` is called from as many threads."""

    workers: int

    @abc.abstractmethod
    def run(self, arguments: list[str], log: Path) -> int:
        """Wait for `sweep_cell` with these arguments, whose output is appended to `log`; its exit status.

        `os.EX_TEMPFAIL` is that of a run which was asked to stop, saved, and can go on.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask what is running to end, and start nothing more: `run` then gives `os.EX_TEMPFAIL`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the cluster; nothing is running any more."""


def worker_command(arguments: list[str]) -> list[str]:
    """`sweep_cell` as a process of its own."""
    return [sys.executable, "-m", "recallax.sweep.worker", *arguments]


def thread_environment(num_cores: int) -> dict[str, str]:
    """The environment of a process that computes on so many cores."""
    return dict.fromkeys(("PJRT_NPROC", "NPROC", "OMP_NUM_THREADS"), str(num_cores))


def queue_size(workers: int | None) -> int:
    """How many runs a sweep has in a cluster's queue. Raises ConfigError for a number that trains nothing."""
    if workers is not None and workers < 1:
        raise ConfigError(
            f"workers is {workers}; it must be at least 1, or left out for {DEFAULT_QUEUE_SIZE} in the queue"
        )
    return DEFAULT_QUEUE_SIZE if workers is None else workers


class LocalBackend(Backend):
    """Processes of this machine: one per accelerator, or `workers` that share the cores out."""

    def __init__(self, workers: int | None = None):
        devices = visible_gpus()
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}; it must be at least 1, or left out for one per device or core")
        self.workers = (len(devices) or available_cores()) if workers is None else workers
        if devices and self.workers > len(devices):
            raise ConfigError(
                f"workers is {workers}; there are {len(devices)} accelerators, and each takes one process"
            )
        self._environment = {**os.environ, **thread_environment(max(1, available_cores() // self.workers))}
        self._free_devices: SimpleQueue[str | None] = SimpleQueue()
        for slot in range(self.workers):
            self._free_devices.put(devices[slot] if devices else None)
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        self._lock = Lock()

    def run(self, arguments: list[str], log: Path) -> int:
        return self.execute(worker_command(arguments), log)

    def execute(self, command: list[str], log: Path) -> int:
        """Wait for any command, on a device of its own; its exit status."""
        device = self._free_devices.get()
        try:
            process = self._start(command, log, device)
            if process is None:
                return os.EX_TEMPFAIL
            status = process.wait()
        finally:
            self._free_devices.put(device)
        with self._lock:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()  # a run saves where it stands

    def close(self) -> None:
        pass

    def _start(self, command: list[str], log: Path, device: str | None) -> subprocess.Popen | None:
        """None after `stop`, which must see every process that there is."""
        environment = self._environment | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with self._lock, log.open("a") as file:
            if self._stopped:
                return None
            # In a session of its own, or Ctrl-C would be a first signal and `stop` the second, which ends at once.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            self._running.add(process)
            return process


def visible_gpus() -> list[str]:
    """The NVIDIA devices that this process may use, as CUDA names them; found without starting CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
