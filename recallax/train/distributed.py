"""Runs of several processes, with `jax.distributed`."""

from dataclasses import dataclass

import jax

from recallax.config import Config, ConfigError


@dataclass(frozen=True, kw_only=True)
class Distributed(Config):
    """The processes of a run. They are not part of its config, because they do not change its results."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, or "auto" to detect it (SLURM, TPU pods, Open MPI). None: one process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def initialize(self) -> None:
        """Connect to the other processes; must be called before JAX initializes its devices.

        Raises:
            ConfigError: The fields are inconsistent.
        """
        if self.coordinator_address is None:
            if self.num_processes is not None or self.process_id is not None:
                raise ConfigError(
                    "distributed.num_processes and distributed.process_id need distributed.coordinator_address, which "
                    "must be HOST:PORT or auto"
                )
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
                f"distributed.process_id is {self.process_id} and distributed.num_processes is {self.num_processes}; "
                "with a coordinator both must be given, and processes are numbered from 0"
            )
        # A coordinator on the loopback address must not listen on other interfaces.
        bind = self.coordinator_address if host in ("127.0.0.1", "localhost") else None
        jax.distributed.initialize(
            self.coordinator_address,
            self.num_processes,
            self.process_id,
            coordinator_bind_address=bind if self.process_id == 0 else None,
        )
