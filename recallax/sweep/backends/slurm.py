"""Backend that submits workers as SLURM jobs through the `submitit` package.

The nodes must share the folder of the runs with the machine that submits. SLURM signals a job whose time is up, or that
is preempted: the run saves a checkpoint and is queued again under the same job id. A job that was killed is submitted
again and resumes from its last checkpoint.
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

from recallax.config import ConfigError, require_at_least
from recallax.sweep.backends.backend import Backend, queue_size, thread_environment, worker_command

POLL_SECONDS = 1.0
"""Seconds between checks of a job's result file. submitit queries SLURM at most once a minute."""


@dataclass(frozen=True, kw_only=True)
class SlurmJobOptions:
    """Resources of one SLURM job."""

    partition: str | None = None
    """Partition; the cluster's default where None."""
    minutes: int = 60
    """Wall time in minutes, after which the run saves a checkpoint and is queued again."""
    cpus: int = 1
    """Cores."""
    gpus: float = 0
    """GPUs, a whole number."""
    memory: float | None = None
    """Memory in GiB; the partition's default where None."""
    extra: tuple[str, ...] = ()
    """More options of sbatch, each `name=value`, such as `account=NAME`."""

    def __post_init__(self) -> None:
        require_at_least(1, minutes=self.minutes, cpus=self.cpus)
        if self.gpus < 0 or self.gpus != int(self.gpus):
            raise ConfigError(f"gpus is {self.gpus:g}; it must be a whole number of at least 0")
        if self.memory is not None and self.memory <= 0:
            raise ConfigError(f"memory is {self.memory} GiB; it must be above 0, or omitted for that of the partition")
        if wrong := [text for text in self.extra if not re.fullmatch(r"[A-Za-z][\w-]*=\S.*", text)]:
            raise ConfigError(f"{wrong[0]!r} is not an option of sbatch; write name=value, such as account=NAME")

    def submitit_parameters(self) -> dict[str, Any]:
        """Return the parameters under the names of submitit's AutoExecutor."""
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
    """Jobs in SLURM's queue.

    Args:
        options: Resources of each job.
        folder: Folder for submitit's scripts, results and output.
        workers: Number of runs in the queue; 64 where None.
        executor: "slurm", or "local" for submitit's executor that runs jobs on this machine.
        max_num_timeout: Number of times that a run may reach its wall time.

    Raises:
        ConfigError: submitit is not installed, SLURM is not available, or `workers` is below 1.
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
            raise ConfigError(f"SLURM is not available: {error}; use a machine that has srun") from error
        self._uncompleted_job_error = submitit.core.utils.UncompletedJobError
        self._environment = thread_environment(options.cpus)
        self._running: set[Any] = set()
        self._stopped = False
        self._lock = Lock()  # submitit is not thread-safe

    def run(self, arguments: list[str], log: Path) -> int:
        with self._lock:
            if self._stopped:
                return os.EX_TEMPFAIL
            try:
                job = self._executor.submit(SlurmWorker(arguments, str(log.absolute()), self._environment))
            except self._uncompleted_job_error as error:  # sbatch rejected the job
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
        """Cancel the jobs. Runs save a checkpoint within the time that SLURM grants; this method does not wait."""
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
        except self._uncompleted_job_error as error:  # the job was killed, or its node died
            return _log_failure(log, f"job {job.job_id} was {job.state.lower()}: {error}")


def _log_failure(log: Path, message: str) -> int:
    with log.open("a") as file:
        file.write(f"{message}\n")
    return 1


def _import_submitit() -> Any:
    """Import submitit. Raises ConfigError if it is not installed."""
    log_level = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"  # otherwise the import closes the handlers of all loggers
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            f"--backend slurm needs submitit ({error}); install it with: pip install 'recallax[sweep]'"
        ) from error
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]  # jobs inherit the environment, and their log is useful
        if log_level is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = log_level
    return submitit


class SlurmWorker:
    """Function of a job: runs `recallax.sweep.worker` as a child process of submitit's, and returns its exit status.

    SLURM signals every process of a job. submitit handles USR2 and calls `checkpoint`. The worker ignores USR2, and
    saves a checkpoint on the first TERM or INT.

    Args:
        arguments: Arguments of the worker.
        log: File to which the worker's output is appended.
        environment: Environment variables of the worker, added to those of the job.
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
            self._process.terminate()  # the signal reached submitit's process only
            self._process.wait()  # a worker ends at once when this process does
            raise

    def checkpoint(self) -> Any:
        """Stop the worker after a checkpoint, and return the submission that submitit queues again."""
        import submitit

        if self._process is not None:
            # SLURM may have sent TERM, and a second TERM would end the worker at once (`train.stop_signals`).
            os.kill(self._process.pid, signal.SIGINT)
            # Not `Popen.wait`: this handler interrupted it, and it holds a lock.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(SlurmWorker(self.arguments, self.log, self.environment))
