"""The backend that a command asks for by name."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recallax.config import ConfigError
from recallax.sweep.backends.local import Backend, LocalBackend

type BackendName = Literal["local", "ray", "slurm"]


@dataclass(frozen=True, kw_only=True)
class ResourceOptions:
    """What runs need, where it was said; no backend knows all of it."""

    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    memory: float | None = None
    partition: str | None = None
    minutes: int | None = None
    extra: tuple[str, ...] | None = None


def make_backend(name: BackendName, workers: int | None, resources: ResourceOptions, out: Path) -> Backend:
    """The backend, ready to train. Raises ConfigError for what it does not know, or cannot give."""
    knows, make = BACKEND_FACTORIES[name]
    said = {option: value for option, value in asdict(resources).items() if value is not None}
    if foreign := [option for option in said if option not in knows]:
        others = " or ".join(other for other, (known, _) in BACKEND_FACTORIES.items() if foreign[0] in known)
        raise ConfigError(f"--{foreign[0]} says nothing to --backend {name}; leave it out, or take --backend {others}")
    return make(workers, said, out)


def _make_local(workers: int | None, options: Mapping[str, Any], out: Path) -> Backend:
    return LocalBackend(workers)


def _make_ray(workers: int | None, options: Mapping[str, Any], out: Path) -> Backend:
    from recallax.sweep.backends.ray import RayBackend

    return RayBackend(workers=workers, **options)


def _make_slurm(workers: int | None, options: Mapping[str, Any], out: Path) -> Backend:
    from recallax.sweep.backends.slurm import SlurmBackend, SlurmJobOptions

    return SlurmBackend(SlurmJobOptions(**options), out / "slurm", workers=workers)


BACKEND_FACTORIES: dict[
    BackendName, tuple[tuple[str, ...], Callable[[int | None, Mapping[str, Any], Path], Backend]]
] = {
    "local": ((), _make_local),
    "ray": (("address", "cpus", "gpus"), _make_ray),
    "slurm": (("cpus", "gpus", "memory", "partition", "minutes", "extra"), _make_slurm),
}
"""What each knows, and how it is made."""
