"""The backend that a command asks for by name."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from recallax.config import ConfigError
from recallax.train.backend import Backend, Local

type Name = Literal["local", "ray", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What runs need, where it was said; no backend knows all of it."""

    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    memory: float | None = None
    partition: str | None = None
    minutes: int | None = None
    extra: tuple[str, ...] | None = None


def backend_of(name: Name, workers: int | None, asked: Asked, out: Path) -> Backend:
    """The backend, ready to train. Raises ConfigError for what it does not know, or cannot give."""
    knows, make = BACKENDS[name]
    said = {option: value for option, value in asdict(asked).items() if value is not None}
    if foreign := [option for option in said if option not in knows]:
        others = " or ".join(other for other, (known, _) in BACKENDS.items() if foreign[0] in known)
        raise ConfigError(f"--{foreign[0]} says nothing to --backend {name}; leave it out, or take --backend {others}")
    return make(workers, said, out)


def _local(workers: int | None, said: Mapping[str, Any], out: Path) -> Backend:
    return Local(workers)


def _ray(workers: int | None, said: Mapping[str, Any], out: Path) -> Backend:
    from recallax.train.backend_ray import Ray

    return Ray(workers=workers, **said)


def _slurm(workers: int | None, said: Mapping[str, Any], out: Path) -> Backend:
    from recallax.train.backend_slurm import Job, Slurm

    return Slurm(Job(**said), out / "slurm", workers=workers)


BACKENDS: dict[Name, tuple[tuple[str, ...], Callable[[int | None, Mapping[str, Any], Path], Backend]]] = {
    "local": ((), _local),
    "ray": (("address", "cpus", "gpus"), _ray),
    "slurm": (("cpus", "gpus", "memory", "partition", "minutes", "extra"), _slurm),
}
"""What each knows, and how it is made."""
