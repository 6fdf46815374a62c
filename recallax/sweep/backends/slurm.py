"""Runs as jobs of SLURM, submitted by submitit from a machine that shares the folder of the runs with the nodes.

A run that must yield is told so by SLURM (its time is up, or another job takes its place), saves, and goes back into
the queue under the same number; one that was killed is submitted again, and goes on from its last checkpoint.
"""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from recallax.config import ConfigError
from recallax.sweep.backends.local import Backend, queue_size, thread_environment, worker_command

POLL_SECONDS = 1.0
"""Seconds between looks at a job's result; SLURM itself is asked once a minute at most."""


@dataclass(frozen=True, kw_only=True)
class SlurmJobOptions:
    """What one run asks of SLURM."""

    partition: str | None = None
    minutes: int = 60
    """Wall time, after which the run saves and queues again."""
    cpus: int = 1
    gpus: float = 0
    memory: float | None = None
    """GiB; the partition's default where None."""
    extra: tuple[str, ...] = ()
    """Further options of sbatch, `name=value` each, such as `account=ours`."""

    def __post_init__(self) -> None:
        whole = self.gpus >= 0 and self.gpus == int(self.gpus)
        if min(self.minutes, self.cpus) < 1 or not whole or (self.memory is not None and self.memory <= 0):
            raise ConfigError(
                f"a job has {self.minutes} minutes, {self.cpus} cpus, {self.gpus:g} gpus and {self.memory} GiB; "
                f"it needs at least 1, 1 and 0, whole gpus, and memory above 0"
            )
        if wrong := [text for text in self.extra if not re.fullmatch(r"[A-Za-z][\w-]*=\S.*", text)]:
            raise ConfigError(f"{wrong[0]!r} is no option of sbatch; write name=value, such as account=ours")

    def submitit_parameters(self) -> dict[str, Any]:
        """As submitit's AutoExecutor calls them."""
        return {
            "name": "recallax",
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": int(self.gpus) or None,
            "mem_gb": self.memory,
            "slurm_partition": self.partition,
            "slurm_additional_parameters": dict(text.split("=", 1) for text in self.extra) or None,
        }


class SlurmBackend(Backend):
    """SLURM's queue, or with executor "local" what submitit has in its place on one machine.

    folder: where submitit keeps scripts, results and its own output of jobs.
    yields: times that a run may use up its minutes.
    """

    def __init__(
        self,
        options: SlurmJobOptions,
        folder: Path,
        *,
        workers: int | None = None,
        executor: Literal["slurm", "local"] = "slurm",
        max_num_timeout: int = 100,
    ):
        self.workers = queue_size(workers)
        submitit = _import_submitit()
        folder = folder.absolute()
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=executor, slurm_max_num_timeout=max_num_timeout)
            self._executor.update_parameters(**options.submitit_parameters())
        except RuntimeError as error:  # no srun
            raise ConfigError(f"there is no SLURM here: {error}; submit from a machine that has srun") from error
        self._uncompleted_job_error = submitit.core.utils.UncompletedJobError
        self._environment = thread_environment(options.cpus)
        self._running: set[Any] = set()
        self._stopped = False
        self._lock = Lock()  # submitit is not made for threads

    def run(self, arguments: list[str], log: Path) -> int:
        with self._lock:
            if self._stopped:
                return os.EX_TEMPFAIL
            try:
                job = self._executor.submit(SlurmWorker(arguments, str(log.absolute()), self._environment))
            except self._uncompleted_job_error as error:  # sbatch refuses it
                return _log_failure(log, f"{error}")
            self._running.add(job)
        while not self._stopped:
            with self._lock:
                ended = job.done()
            if ended:
                return self._result(job, log)
            time.sleep(POLL_SECONDS)
        return os.EX_TEMPFAIL

    def stop(self) -> None:
        """Runs save within the time that SLURM leaves them, and nobody waits for it."""
        with self._lock:
            self._stopped = True
            for job in self._running:
                job.cancel(check=False)

    def close(self) -> None:
        pass

    def _result(self, job: Any, log: Path) -> int:
        with self._lock:
            self._running.discard(job)
        try:
            return job.result()
        except self._uncompleted_job_error as error:  # killed, or the node is gone
            return _log_failure(log, f"job {job.job_id} was {job.state.lower()}: {error}")


def _log_failure(log: Path, message: str) -> int:
    with log.open("a") as file:
        file.write(f"{message}\n")
    return 1


def _import_submitit() -> Any:
    """The module. Raises ConfigError without it."""
    before = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"  # else its import closes every handler of this process's loggers
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            f"--backend slurm needs submitit ({error}); install it with: pip install 'recallax[sweep]'"
        ) from error
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]  # in a job its log is of use
        if before is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = before
    return submitit


class SlurmWorker:
    """The function of a job: `sweep_cell` in a process beside submitit's; gives its exit status.

    SLURM signals every process of a job. submitit acts on USR2, for which it calls `checkpoint`; the run knows nothing
    of USR2, and takes TERM and INT once each to mean that it is to save.
    """

    def __init__(self, arguments: list[str], log: str, environment: dict[str, str]):
        self.arguments, self.log, self.environment = arguments, log, environment
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        with open(self.log, "a") as file:
            self._process = subprocess.Popen(
                worker_command(self.arguments),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        try:
            return self._process.wait()
        except KeyboardInterrupt:
            self._process.terminate()  # a signal to this process alone
            raise

    def checkpoint(self) -> Any:
        """Let the run save and end; what submitit puts back into the queue."""
        import submitit

        if self._process is not None:
            os.kill(self._process.pid, signal.SIGINT)  # not TERM, which it may have had from SLURM
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # `wait` was interrupted, and holds a lock
        return submitit.helpers.DelayedSubmission(SlurmWorker(self.arguments, self.log, self.environment))
