"""Backend that runs workers as processes of this machine."""

import os
import subprocess
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from recallax.config import ConfigError, require_at_least
from recallax.sweep.backends.backend import Backend, thread_environment, worker_command
from recallax.train.log import available_cores


class LocalBackend(Backend):
    """Processes of this machine: one per GPU, or `workers` processes that divide the cores among them.

    The workers end with this process, also if it is killed.

    Args:
        workers: Number of concurrent processes; by default the number of GPUs, or of cores where there is no GPU.

    Raises:
        ConfigError: The number is below 1, or above the number of GPUs.
    """

    def __init__(self, workers: int | None = None):
        devices = visible_gpus()
        require_at_least(1, "", "or omitted for one per GPU or core", workers=workers)
        self.workers = (len(devices) or available_cores()) if workers is None else workers
        if devices and self.workers > len(devices):
            raise ConfigError(
                f"workers is {workers}; there are {len(devices)} GPUs, and each runs one process at a time"
            )
        self._environment = {**os.environ, **thread_environment(max(1, available_cores() // self.workers))}
        self._free_devices: SimpleQueue[str | None] = SimpleQueue()
        for index in range(self.workers):
            self._free_devices.put(devices[index] if devices else None)
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        self._lock = Lock()

    def run(self, arguments: list[str], log: Path) -> int:
        return self.execute(worker_command(arguments), log)

    def execute(self, command: list[str], log: Path) -> int:
        """Run any command on a free GPU, or on the CPU, and wait until it ends.

        Args:
            command: Command line.
            log: File to which the output is appended.

        Returns:
            The exit status; `os.EX_TEMPFAIL` after `stop`.
        """
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
                process.terminate()  # a run saves a checkpoint on SIGTERM

    def close(self) -> None:
        pass

    def _start(self, command: list[str], log: Path, device: str | None) -> subprocess.Popen | None:
        """Start a process under the lock, so that `stop` sees every process. Returns None after `stop`."""
        environment = self._environment | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with self._lock, log.open("a") as file:
            if self._stopped:
                return None
            # In its own session the process does not receive Ctrl-C. That would count as a first signal, and the one of
            # `stop` as the second, which ends a run without a checkpoint.
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            self._running.add(process)
            return process


def visible_gpus() -> list[str]:
    """Return the names that CUDA has for the NVIDIA GPUs this process may use, without starting CUDA."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None:
        return [name for name in variable.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
