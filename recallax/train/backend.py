"""Where the processes of a sweep run."""

import abc
import os
import subprocess
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from recallax.config import ConfigError


class Backend(abc.ABC):
    """Runs commands, `workers` at a time: `run` is called from as many threads."""

    workers: int

    @abc.abstractmethod
    def run(self, command: list[str], log: Path) -> int:
        """Wait for a command, whose output is appended to `log`; its exit status."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask what is running to end."""


class Local(Backend):
    """Processes of this machine: one per accelerator, or `workers` that share the cores out."""

    def __init__(self, workers: int | None = None):
        devices = accelerators()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or len(devices) or cores
        if self.workers < 1:
            raise ConfigError(f"workers is {workers}; it must be at least 1")
        if devices and self.workers > len(devices):
            raise ConfigError(
                f"workers is {workers}; there are {len(devices)} accelerators, and each takes one process"
            )
        share = str(max(1, cores // self.workers))
        self._environment = {**os.environ, "PJRT_NPROC": share, "NPROC": share, "OMP_NUM_THREADS": share}
        self._slots: SimpleQueue[str | None] = SimpleQueue()
        for slot in range(self.workers):
            self._slots.put(devices[slot] if devices else None)
        self._running: set[subprocess.Popen] = set()
        self._lock = Lock()

    def run(self, command: list[str], log: Path) -> int:
        device = self._slots.get()
        environment = self._environment | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        try:
            with log.open("a") as file:
                # In a session of its own, or Ctrl-C would be a first signal and `stop` the second, which ends at once.
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                with self._lock:
                    self._running.add(process)
                status = process.wait()
        finally:
            self._slots.put(device)
        with self._lock:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        with self._lock:
            for process in self._running:
                process.terminate()  # a run saves where it stands


def accelerators() -> list[str]:
    """The NVIDIA devices that this process may use, as CUDA names them; found without starting CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
