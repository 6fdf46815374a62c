"""Backend that runs workers as tasks of a Ray cluster.

The nodes must share the folder of the runs and have this Python environment. Ray queues and places the tasks. Each task
has a worker process of its own, which ends with the task: a crash ends only that worker, the next run finds its
accelerator free, and a process that Ray kills leaves no children behind.
"""

import ipaddress
import os
import signal
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from recallax.config import ConfigError, require_at_least
from recallax.sweep.backends.backend import Backend, queue_size, thread_environment
from recallax.train.log import available_cores

OBJECT_STORE_BYTES = 100 * 2**20
"""Size of Ray's object store on this machine. Tasks exchange only paths, and Ray's default is 30 % of the memory."""


class RayBackend(Backend):
    """Tasks of a Ray cluster.

    Args:
        address: Address of the cluster. Default: RAY_ADDRESS, otherwise a cluster on this machine that ends with the
            sweep and that other machines cannot reach.
        workers: Number of runs in Ray's queue; `cpus` and `gpus` determine how many of them run at a time.
        cpus: Cores per run.
        gpus: Accelerators per run; a fraction shares one. Default: 1 if the cluster has any.

    Raises:
        ConfigError: Ray is not installed, there is no cluster at the address, or a run needs more than the cluster has.
    """

    def __init__(
        self, address: str | None = None, *, workers: int | None = None, cpus: int = 1, gpus: float | None = None
    ):
        self.workers = queue_size(workers)
        require_at_least(1, cpus=cpus)
        require_at_least(0, gpus=gpus)
        self._ray = _connect(address)
        try:
            resources = required_resources(self._ray.cluster_resources(), cpus, gpus)
        except ConfigError:
            self.close()
            raise
        # max_calls=1 ends the process with its run. max_retries=0 leaves retries to the sweep.
        self._task = self._ray.remote(
            num_cpus=cpus, num_gpus=resources["GPU"], max_calls=1, max_retries=0, scheduling_strategy="SPREAD"
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
        except self._ray.exceptions.RayError as error:  # the worker or its node died
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
                self._ray.cancel(task)  # sends SIGINT, on which a run saves a checkpoint

    def close(self) -> None:
        self._ray.shutdown()


def required_resources(available: Mapping[str, float], cpus: int, gpus: float | None) -> dict[str, float]:
    """Compute the resources of a run, and check that the whole cluster has them.

    A single node may still be too small; Ray then prints a warning and waits.

    Args:
        available: Resources of the cluster by name, `CPU` and `GPU`.
        cpus: Cores per run.
        gpus: Accelerators per run; None for 1 if the cluster has any.

    Returns:
        The resources of a run by name.

    Raises:
        ConfigError: A run needs more than the whole cluster has.
    """
    required = {"CPU": float(cpus), "GPU": min(1.0, available.get("GPU", 0.0)) if gpus is None else gpus}
    if lacking := [name for name, number in required.items() if number > available.get(name, 0)]:
        numbers = ", ".join(f"{required[name]:g} {name} of {available.get(name, 0):g}" for name in lacking)
        raise ConfigError(f"a run needs more than the whole cluster has: {numbers}; lower --cpus or --gpus")
    return required


def _connect(address: str | None) -> Any:
    """Connect to a cluster, or start one on this machine; returns the module `ray`. Raises ConfigError."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        # Ray reads this when it is imported. With 0 it binds to the loopback address; with 1, its default on Linux, to
        # all of them, and anyone who can connect to its ports can execute code.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--backend ray needs Ray ({error}); install it with: pip install 'recallax[sweep]'"
        ) from error
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
            ray.init(
                address="local",
                num_cpus=available_cores(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"there is no Ray cluster at {address or 'this machine'}: {error}") from error
    if not address:
        _warn_if_reachable(ray.nodes()[0]["NodeManagerAddress"])
    return ray


def _warn_if_reachable(address: str) -> None:
    """Warn if a cluster of this machine has an address that other machines can reach."""
    if not ipaddress.ip_address(address).is_loopback:
        warnings.warn(
            f"Ray listens on {address}, where other machines can execute code; unset RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
            RuntimeWarning,
            stacklevel=4,
        )


def _run_worker_task(arguments: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
    """Run `recallax.sweep.worker` in a process of Ray, with its output in `log`; returns its exit status."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored if the sweep was started in the background
    os.environ.update(environment)  # before JAX starts its backend
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
