"""A process that trains when told to, so that two of them can take turns on the same cores.

The driver writes JSON lines to its standard input, {"steps": n}, and reads one line of times, losses and gradient
norms for each. Both sides use this file: it needs Python 3.11 and nothing installed.
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
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained; lies as `job.json` in a folder that both sides read."""

    mixer: str
    vocab_size: int
    length: int
    pairs: int
    threads: int
    steps: int
    """The most steps that will be asked for: so many batches are made beforehand."""
    d_model: int = 64
    batch_size: int = 64

    def write(self, folder: Path) -> None:
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Job":
        return cls(**json.loads((folder / "job.json").read_text()))


@dataclass(frozen=True)
class Answer:
    """What a worker says of some steps."""

    seconds: list[float]
    cpu_seconds: list[float]
    """Of all its threads: what it would take on one idle core, where it has one thread."""
    losses: list[float]
    norms: list[float]


class Trainer(ABC):
    """One side's model, optimizer and batches."""

    @abstractmethod
    def step(self, index: int) -> Any:
        """Take optimizer step `index` and return when its results are in memory."""

    @abstractmethod
    def read(self, result: Any) -> tuple[float, float]:
        """Loss and global norm of the gradient before clipping, of what `step` returned; not timed."""


def serve(trainer: Trainer, versions: dict[str, str]) -> None:
    """Answer the driver until it closes the pipe."""
    pipe, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not get between the answers
    print(json.dumps(versions), file=pipe, flush=True)
    done = 0
    for line in sys.stdin:
        seconds, cpu_seconds, results = [], [], []
        for index in range(done, done + json.loads(line)["steps"]):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = trainer.step(index)
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
            results.append(trainer.read(result))
        done += len(seconds)
        losses, norms = zip(*results, strict=True)
        answer = Answer(seconds, cpu_seconds, list(losses), list(norms))
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

    def steps(self, count: int) -> Answer:
        """Take `count` steps more."""
        assert self._process.stdin is not None
        print(json.dumps({"steps": count}), file=self._process.stdin, flush=True)
        return Answer(**self._receive())

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
