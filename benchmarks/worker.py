"""A process that runs steps on request, so that several can run alternately on the same cores.

The driver writes a `StepRequest` per line to its standard input and reads one `StepReply` for each. Both sides use this
file: it needs Python 3.11 and numpy.
"""

import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.messages import StepReply, StepRequest


class Workload(ABC):
    """Computation of one side of a comparison, step by step."""

    @abstractmethod
    def step(self, part: str, index: int) -> Any:
        """Run one step and return when its results are in memory.

        Args:
            part: The part of the workload; "" where it has one part only.
            index: The number of the step.

        Returns:
            What `read` takes.
        """

    @abstractmethod
    def read(self, result: Any) -> list[float]:
        """Return a few numbers of a step's result; not timed."""


def serve_workload(workload: Workload, versions: dict[str, str]) -> None:
    """Reply to the driver until it closes the pipe.

    Args:
        workload: What to run.
        versions: Of the libraries under test, by name.

    Raises:
        HandoverError: The driver sends something other than a `StepRequest`.
    """
    pipe, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the replies
    print(json.dumps(versions), file=pipe, flush=True)
    done = 0
    for line in sys.stdin:
        request = StepRequest.decode(line)
        reply = StepReply(seconds=[], cpu_seconds=[], readings=[])
        for index in range(done, done + request.steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = workload.step(request.part, index)
            reply.seconds.append(time.perf_counter() - start)
            reply.cpu_seconds.append(time.process_time() - cpu_start)
            reply.readings.append(workload.read(result))
        done += request.steps
        print(reply.encode(), file=pipe, flush=True)


class WorkerError(RuntimeError):
    """A worker ended before it replied."""


class Worker:
    """The driver's end of one process.

    Args:
        name: For messages and for the log file.
        command: The program and its arguments.
        threads: Cores that the process is pinned to, and threads of its libraries.
        folder: Where the log file is written.

    Raises:
        WorkerError: The process ended before it was ready; the message has the end of its log.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int, folder: Path):
        self.name = name
        self._log = folder / f"{name}.log"
        count = str(threads)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PIN_SCRIPT, count, *command],
                cwd=Path(__file__).parents[1],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": count,
                    "MKL_NUM_THREADS": count,
                    "PJRT_NPROC": count,  # jax 0.12
                    "NPROC": count,  # older versions
                    "JAX_PLATFORMS": "cpu",
                    "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.versions: dict[str, str] = json.loads(self._receive())

    def run_steps(self, count: int, part: str = "") -> StepReply:
        """Run further steps.

        Args:
            count: How many.
            part: The part of the workload; "" where it has one part only.

        Returns:
            Times and readings of the steps.

        Raises:
            WorkerError: The process ended.
            HandoverError: The reply is not a `StepReply`.
        """
        assert self._process.stdin is not None
        print(StepRequest(steps=count, part=part).encode(), file=self._process.stdin, flush=True)
        return StepReply.decode(self._receive())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _receive(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise WorkerError(f"{self.name} ended without a reply:\n{self._log.read_text()[-3000:]}")
        return line


# Cores are chosen before a library counts them. Where the system cannot pin, the environment's numbers alone hold.
_PIN_SCRIPT = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
os.execvp(sys.argv[2], sys.argv[2:])
"""
