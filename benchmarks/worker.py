"""A process that works when told to, so that several can take turns on the same cores.

The driver writes JSON lines to its standard input, {"part": name, "steps": n}, and reads one line of times and readings
for each. Both sides use this file: it needs Python 3.11 and nothing installed.
"""

import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Answer:
    """What a worker says of some steps."""

    seconds: list[float]
    cpu_seconds: list[float]
    """Of all its threads: what it would take on one idle core, where it has one thread."""
    readings: list[list[float]]
    """What `Work.read` tells of each step."""


class Work(ABC):
    """What one side does, step by step."""

    @abstractmethod
    def step(self, part: str, index: int) -> Any:
        """Do the step `index` of a part of the work and return when its results are in memory."""

    @abstractmethod
    def read(self, result: Any) -> list[float]:
        """A few numbers of what `step` returned; not timed."""


def serve(work: Work, versions: dict[str, str]) -> None:
    """Answer the driver until it closes the pipe."""
    pipe, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not get between the answers
    print(json.dumps(versions), file=pipe, flush=True)
    done = 0
    for line in sys.stdin:
        asked = json.loads(line)
        answer = Answer([], [], [])
        for index in range(done, done + asked["steps"]):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = work.step(asked["part"], index)
            answer.seconds.append(time.perf_counter() - start)
            answer.cpu_seconds.append(time.process_time() - cpu_start)
            answer.readings.append(work.read(result))
        done += asked["steps"]
        print(json.dumps(asdict(answer)), file=pipe, flush=True)


class WorkerError(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """The driver's end of one process."""

    def __init__(self, name: str, command: Sequence[str], threads: int, folder: Path):
        """Start `command` on as many cores as it has threads. Returns once the process is ready."""
        self.name = name
        self._log = folder / f"{name}.log"
        count = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PIN, count, *command],
            cwd=Path(__file__).parents[1],
            env={
                **os.environ,
                "OMP_NUM_THREADS": count,
                "MKL_NUM_THREADS": count,
                "PJRT_NPROC": count,  # jax 0.12
                "NPROC": count,  # older ones
                "JAX_PLATFORMS": "cpu",
                "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        self.versions: dict[str, str] = self._receive()

    def steps(self, count: int, part: str = "") -> Answer:
        """Take `count` steps more of a part of the work; "" where it has one part only."""
        assert self._process.stdin is not None
        print(json.dumps({"part": part, "steps": count}), file=self._process.stdin, flush=True)
        return Answer(**self._receive())

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

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise WorkerError(f"{self.name} stopped without an answer:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)


# Cores are chosen before a library counts them. Where the system cannot pin, the environment's numbers alone hold.
_PIN = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
os.execvp(sys.argv[2], sys.argv[2:])
"""
