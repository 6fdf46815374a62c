"""Several processes as one run, by `jax.distributed`."""

from dataclasses import dataclass

import jax

from recallax.config import Config, ConfigError


@dataclass(frozen=True, kw_only=True)
class Distributed(Config):
    """Where this process stands among those of a run; not part of the run's config, since it changes no number."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, or "auto" where the cluster tells (SLURM, TPU pods, Open MPI). None: one process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def initialize(self) -> None:
        """Join the others. Must come before anything else asks jax for its devices."""
        if self.coordinator_address is None:
            if self.num_processes is not None or self.process_id is not None:
                raise ConfigError("distributed.processes and .process need distributed.coordinator, HOST:PORT or auto")
            return
        if self.coordinator_address == "auto":
            jax.distributed.initialize()
            return
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                f"distributed.coordinator_address is {self.coordinator_address!r}; it must be HOST:PORT or auto"
            )
        if self.num_processes is None or self.process_id is None or not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"distributed.process_id is {self.process_id} of distributed.processes {self.num_processes}; with a coordinator "
                f"both must be given, and the processes are numbered from 0"
            )
        bind = (
            self.coordinator_address if host in ("127.0.0.1", "localhost") else None
        )  # loopback is not opened to the network
        jax.distributed.initialize(
            self.coordinator_address,
            self.num_processes,
            self.process_id,
            coordinator_bind_address=bind if self.process_id == 0 else None,
        )
