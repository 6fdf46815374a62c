"""Runs as tasks of a Ray cluster, whose nodes share the folder of the runs and have this environment.

Ray queues and places them. Each is trained in a worker process of its own, which ends with it: a crash takes that
worker alone, the next run finds its accelerator free, and what Ray kills has no children that live on.
"""

import os
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from recallax.config import ConfigError
from recallax.sweep.backends.local import Backend, queue_size, thread_environment
from recallax.train.log import available_cores

OBJECT_STORE_BYTES = 100 * 2**20
"""Bytes for what tasks pass to one another, here nothing but paths; Ray itself would take a third of the memory."""


class RayBackend(Backend):
    """A cluster at `address`, or RAY_ADDRESS, or else one that is started on this machine and ends with the sweep.

    workers: runs in Ray's queue at a time; how many of them train is for `cpus` and `gpus` of each to say.
    gpus: by default 1 where the cluster has any; a fraction shares one.
    """

    def __init__(
        self, address: str | None = None, *, workers: int | None = None, cpus: int = 1, gpus: float | None = None
    ):
        self.workers = queue_size(workers)
        if cpus < 1 or (gpus is not None and gpus < 0):
            raise ConfigError(f"each run gets {cpus} cpus and {gpus} gpus; it needs at least 1 and 0")
        self._ray = _connect(address)
        try:
            wants = required_resources(self._ray.cluster_resources(), cpus, gpus)
        except ConfigError:
            self.close()
            raise
        # A worker ends with its run (max_calls), and a run that fails is the sweep's to try again (max_retries).
        self._task = self._ray.remote(
            num_cpus=cpus, num_gpus=wants["GPU"], max_calls=1, max_retries=0, scheduling_strategy="SPREAD"
        )(_run_worker_task)
        self._environment = thread_environment(cpus)
        self._running: set[Any] = set()
        self._stopped = False
        self._lock = Lock()

    def run(self, arguments: list[str], log: Path) -> int:
        with self._lock:
            if self._stopped:
                return os.EX_TEMPFAIL
            task = self._task.remote(arguments, str(log.absolute()), str(Path.cwd()), self._environment)
            self._running.add(task)
        try:
            return self._ray.get(task)
        except self._ray.exceptions.TaskCancelledError:
            return os.EX_TEMPFAIL
        except self._ray.exceptions.RayError as error:  # the worker or its node is gone
            with log.open("a") as file:
                file.write(f"{error}\n")
            return 1
        finally:
            with self._lock:
                self._running.discard(task)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for task in self._running:
                self._ray.cancel(task)  # a run sees SIGINT, and saves where it stands

    def close(self) -> None:
        self._ray.shutdown()


def required_resources(available: Mapping[str, float], cpus: int, gpus: float | None) -> dict[str, float]:
    """What each run asks for, of a cluster that has so much. Raises ConfigError where that is more than all of it.

    Of the whole and not of one node: Ray says itself, and waits, where no node is large enough.
    """
    wants = {"CPU": float(cpus), "GPU": min(1.0, available.get("GPU", 0.0)) if gpus is None else gpus}
    if lacking := [name for name, number in wants.items() if number > available.get(name, 0)]:
        told = ", ".join(f"{wants[name]:g} {name} of {available.get(name, 0):g}" for name in lacking)
        raise ConfigError(f"a run asks for more than the whole cluster has: {told}; lower --cpus or --gpus")
    return wants


def _connect(address: str | None) -> Any:
    """Ray's module, connected. Raises ConfigError."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--backend ray needs Ray ({error}); install it with: pip install 'recallax[sweep]'"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
            ray.init(
                address="local",
                num_cpus=available_cores(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"there is no Ray cluster at {address or 'this machine'}: {error}") from error
    return ray


def _run_worker_task(arguments: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
    """The task, in a worker: what `sweep_cell` does, its output in `log`; the exit status."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the sweep began in the background
    os.environ.update(environment)  # before JAX is imported
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    try:
        from recallax.sweep.worker import run_worker

        return run_worker(arguments)
    except Exception:
        traceback.print_exc()
        return 1
