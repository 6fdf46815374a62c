"""Construction of a sweep backend from its name and resource options."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from recallax.config import ConfigError
from recallax.sweep.backends.backend import Backend
from recallax.sweep.backends.local import LocalBackend

type BackendName = Literal["local", "ray", "slurm"]


class ResourceOptions(TypedDict, total=False):
    """Resource options given on the command line. None: not given. Each backend supports some of them."""

    address: str | None
    """Address of the Ray cluster."""
    cpus: int | None
    """Cores per run."""
    gpus: float | None
    """Accelerators per run."""
    memory: float | None
    """Memory per run in GiB."""
    partition: str | None
    """SLURM partition."""
    minutes: int | None
    """Wall time of a SLURM job in minutes."""
    extra: tuple[str, ...] | None
    """More options of sbatch, each `name=value`."""


def make_backend(name: BackendName, workers: int | None, resources: ResourceOptions, out: Path) -> Backend:
    """Make a backend that is ready to run workers.

    Args:
        name: Name of the backend.
        workers: Number of concurrent runs, or None for the backend's default.
        resources: Resource options.
        out: Folder of the sweep.

    Returns:
        The backend. The caller closes it.

    Raises:
        ConfigError: The backend does not support an option, lacks its package, or cannot provide the resources.
    """
    supported, make = BACKEND_FACTORIES[name]
    options = {option: value for option, value in resources.items() if value is not None}
    if unsupported := [option for option in options if option not in supported]:
        option = unsupported[0]
        others = " or ".join(other for other, factory in BACKEND_FACTORIES.items() if option in factory.options)
        raise ConfigError(f"--{option} is not supported by --backend {name}; omit it, or use --backend {others}")
    return make(workers, options, out)


def _make_local(workers: int | None, options: Mapping[str, Any], out: Path) -> Backend:
    return LocalBackend(workers)


def _make_ray(workers: int | None, options: Mapping[str, Any], out: Path) -> Backend:
    from recallax.sweep.backends.ray import RayBackend

    return RayBackend(workers=workers, **options)


def _make_slurm(workers: int | None, options: Mapping[str, Any], out: Path) -> Backend:
    from recallax.sweep.backends.slurm import SlurmBackend, SlurmJobOptions

    return SlurmBackend(SlurmJobOptions(**options), out / "slurm", workers=workers)


class BackendFactory(NamedTuple):
    """The options that a backend supports, and the function that makes it."""

    options: tuple[str, ...]
    make: Callable[[int | None, Mapping[str, Any], Path], Backend]


BACKEND_FACTORIES: dict[BackendName, BackendFactory] = {
    "local": BackendFactory((), _make_local),
    "ray": BackendFactory(("address", "cpus", "gpus"), _make_ray),
    "slurm": BackendFactory(("cpus", "gpus", "memory", "partition", "minutes", "extra"), _make_slurm),
}
