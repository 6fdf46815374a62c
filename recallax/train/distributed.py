"""Several processes as one run, by `jax.distributed`."""

from dataclasses import dataclass

import jax

from recallax.config import Config, ConfigError


@dataclass(frozen=True, kw_only=True)
class Distributed(Config):
    """Where this process stands among those of a run; not part of the run's config, since it changes no number."""

    coordinator: str | None = None
    """HOST:PORT of process 0, or "auto" where the cluster tells (SLURM, TPU pods, Open MPI). None: one process."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""

    def start(self) -> None:
        """Join the others. Must come before anything else asks jax for its devices."""
        if self.coordinator is None:
            if self.processes is not None or self.process is not None:
                raise ConfigError("distributed.processes and .process need distributed.coordinator, HOST:PORT or auto")
            return
        if self.coordinator == "auto":
            jax.distributed.initialize()
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"distributed.coordinator is {self.coordinator!r}; it must be HOST:PORT or auto")
        if self.processes is None or self.process is None or not 0 <= self.process < self.processes:
            raise ConfigError(
                f"distributed.process is {self.process} of distributed.processes {self.processes}; with a coordinator "
                f"both must be given, and the processes are numbered from 0"
            )
        bind = self.coordinator if host in ("127.0.0.1", "localhost") else None  # loopback is not opened to the network
        jax.distributed.initialize(
            self.coordinator, self.processes, self.process, coordinator_bind_address=bind if self.process == 0 else None
        )
