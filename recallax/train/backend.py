"""Where the processes of a sweep run."""

import abc
import os
import subprocess
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from recallax.config import ConfigError
from recallax.train.log import cores


class Backend(abc.ABC):
    """Runs commands, `workers` at a time: `run` is called from as many threads."""

    workers: int

    @abc.abstractmethod
    def run(self, command: list[str], log: Path) -> int:
        """Wait for a command, whose output is appended to `log`; its exit status."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask what is running to end, and start nothing more: `run` then gives `os.EX_TEMPFAIL`."""


class Local(Backend):
    """Processes of this machine: one per accelerator, or `workers` that share the cores out."""

    def __init__(self, workers: int | None = None):
        devices = accelerators()
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}; it must be at least 1, or left out for one per device or core")
        self.workers = (len(devices) or cores()) if workers is None else workers
        if devices and self.workers > len(devices):
            raise ConfigError(
                f"workers is {workers}; there are {len(devices)} accelerators, and each takes one process"
            )
        share = str(max(1, cores() // self.workers))
        self._environment = {**os.environ, "PJRT_NPROC": share, "NPROC": share, "OMP_NUM_THREADS": share}
        self._slots: SimpleQueue[str | None] = SimpleQueue()
        for slot in range(self.workers):
            self._slots.put(devices[slot] if devices else None)
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        self._lock = Lock()

    def run(self, command: list[str], log: Path) -> int:
        device = self._slots.get()
        try:
            process = self._start(command, log, device)
            if process is None:
                return os.EX_TEMPFAIL
            status = process.wait()
        finally:
            self._slots.put(device)
        with self._lock:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()  # a run saves where it stands

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


def accelerators() -> list[str]:
    """The NVIDIA devices that this process may use, as CUDA names them; found without starting CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
