"""Runs of several processes, with `jax.distributed`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from recallax.config import Config, ConfigError, require_at_least
from recallax.train.process_agreement import one_line
from recallax.train.runtime_messages import filter_standard_error

CONNECTION_WORDS = ("Gloo", "NCCL", "closed by peer", "reset by peer", "Socket closed", "heartbeat")
"""Words in errors of collectives of which another process is the reason."""


class LostProcessError(RuntimeError):
    """A collective failed, because another process of the run has ended."""


@dataclass(frozen=True, kw_only=True)
class Distributed(Config):
    """The processes of a run. They are not part of its config, because they do not change its results."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, or "auto" to detect it (SLURM, TPU pods, Open MPI). None: one process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_timeout: int = 20
    """Time in seconds after which a process that does not answer counts as lost. The other processes then end."""

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
        require_at_least(1, "distributed.", heartbeat_timeout=self.heartbeat_timeout)
        if self.coordinator_address == "auto":
            filter_standard_error()
            jax.distributed.initialize(**self._timeouts())
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
        filter_standard_error()
        jax.distributed.initialize(
            self.coordinator_address,
            self.num_processes,
            self.process_id,
            coordinator_bind_address=bind if self.process_id == 0 else None,
            **self._timeouts(),
        )

    def _timeouts(self) -> dict[str, Any]:
        """Arguments of `jax.distributed.initialize`.

        A process that fails waits at its exit for the others, which may wait for it in a collective. When that wait
        ends, the runtime ends them all.
        """
        seconds = self.heartbeat_timeout
        return {"heartbeat_timeout_seconds": seconds, "shutdown_timeout_seconds": seconds}


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Replace errors of collectives whose connection to another process has broken.

    Raises:
        LostProcessError: The connection has broken.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not any(word in str(error) for word in CONNECTION_WORDS):
            raise
        raise LostProcessError(
            f"lost the connection to another process of the run ({one_line(error)}); see the messages of the others. "
            "The same command resumes the run from its newest checkpoint"
        ) from error
