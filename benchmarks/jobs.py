"""What the two sides of a benchmark do; lies as `job.json` in a folder that both read. Needs Python 3.11 only."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Job:
    """What any benchmark's workers are told."""

    threads: int

    def write(self, folder: Path) -> None:
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / "job.json").read_text()))


@dataclass(frozen=True, kw_only=True)
class Training(Job):
    """A model and the batches that it is trained on."""

    mixer: str
    vocab_size: int
    length: int
    pairs: int
    steps: int
    """The most steps that will be asked for: so many batches are made beforehand."""
    d_model: int = 64
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class OpCall(Job):
    """An op, named as in `op_cases`, and the sizes of its inputs."""

    op: str
    batch: int
    length: int
    heads: int
    keys: int
    values: int
