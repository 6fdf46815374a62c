"""Sweeps: a Python file that yields configs, a run folder for each, and a row for each that is finished.

    OUT/<fingerprint>/        a run folder like any other; report, eval and a second sweep read it
    OUT/<fingerprint>/row.json    what the run came to, written last: a folder that has it is finished
    OUT/<fingerprint>.log     what the run printed, of all attempts
    OUT/results.jsonl         the rows, in the order in which runs ended

The file has `STAGES`, functions from the rows so far to cells. A stage is asked again whenever its cells have ended,
until it has no new ones: so a grid can grow around its best (`further_rates`). Each cell is trained in a process of its
own, so that none can take another down; where it runs is the backend's to say. One that fails is tried again, and goes
on from its last checkpoint; so does one that was asked to stop, which is no failure.
"""

import importlib.util
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recallax.config import ConfigError, fingerprint
from recallax.train.backend import Backend
from recallax.train.log import read_log
from recallax.train.run import RunConfig
from recallax.train.run_folder import write_atomic
from recallax.train.seeds import check_together, without_seeds
from recallax.train.sweep_display import SweepDisplay

type Row = dict[str, Any]
type Stage = Callable[[list[Row]], list["Cell"]]
"""Cells to train, given the rows so far."""


@dataclass(frozen=True)
class Cell:
    """A config, and what a report calls it."""

    labels: Mapping[str, str | int | float]
    config: RunConfig
    probe: Callable[..., Row] | None = None
    """What else to measure of the trained model, from its `Program` and `TrainState`; its entries join the row."""


def stages_of(file: Path) -> list[Stage]:
    """The stages of a sweep's file, which may import what lies in the working directory, also later, when a stage or a
    probe runs. Raises ConfigError.
    """
    if not file.is_file():
        raise ConfigError(f"there is no sweep at {file}; give a Python file that has STAGES")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stages = getattr(module, "STAGES", None)
    if not stages or not all(callable(stage) for stage in stages):
        raise ConfigError(f"{file} has no STAGES; it must be a list of functions from rows to cells")
    return list(stages)


def sweep(file: Path, out: Path, backend: Backend, *, retries: int = 1, together: int = 1) -> int:
    """Train every cell that has no row yet; the number of those that failed for good, which end the sweep's stage.

    together: seeds of one config that one process trains at once, at most; ConfigError for what cannot be.
    """
    if together < 1:
        raise ConfigError(f"{together} seeds at once train nothing; 1 trains each seed alone")
    stages = stages_of(file)
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(out)
    _write(rows, out)
    with SweepDisplay(out) as display:
        for number, stage in enumerate(stages, 1):
            attempts: Counter[str] = Counter()
            while todo := _unmeasured(stage, rows, attempts, retries):
                display.begin(number, len(stages), len(todo))
                for cell, status, row in _train(_groups(todo, together), (file, out, len(rows)), backend, display):
                    attempts[fingerprint(cell.config)] += status != os.EX_TEMPFAIL
                    if row is not None:
                        rows[row["config"]] = row
                        _write(rows, out)
            failed = [name for name in attempts if name not in rows]
            if failed:
                logs = [out / f"{name}.log" for name in failed]  # those that trained at once share one
                display.note(f"{len(failed)} failed: {', '.join(str(log) for log in logs if log.exists())}")
                return len(failed)
    return 0


def rows_of(out: Path) -> dict[str, Row]:
    """The rows of a sweep, by fingerprint; those of runs that ended while nobody watched come last."""
    file = out / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    listed = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have torn the last
    ended = [json.loads(path.read_text()) for path in sorted(out.glob("*/row.json"))]
    rows = {row["config"]: row for row in listed}
    return rows | {row["config"]: row for row in ended if row["config"] not in rows}


def _write(rows: Mapping[str, Row], out: Path) -> None:
    write_atomic(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))


def _unmeasured(stage: Stage, rows: Mapping[str, Row], attempts: Counter[str], retries: int) -> list[Cell]:
    found = {fingerprint(cell.config): cell for cell in stage(list(rows.values()))}
    return [cell for name, cell in found.items() if name not in rows and attempts[name] <= retries]


def _groups(cells: list[Cell], together: int) -> list[list[Cell]]:
    """The cells that one process trains: one each, or seeds of one config. Raises ConfigError if they cannot be."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        own = without_seeds(cell.config) if together > 1 else cell.config
        alike.setdefault(fingerprint(own), []).append(cell)
    groups = [found[i : i + together] for found in alike.values() for i in range(0, len(found), together)]
    for group in groups:
        if len(group) > 1:
            check_together([cell.config for cell in group])
    return groups


def _train(
    groups: list[list[Cell]], asked: tuple[Path, Path, int], backend: Backend, display: SweepDisplay
) -> Iterator[tuple[Cell, int, Row | None]]:
    """Each cell as its process ends, the exit status of that, and the cell's row if it is finished.

    asked: the file, the folder, and how many rows the stage has seen.
    """
    file, out, seen = asked
    with ThreadPoolExecutor(backend.workers) as pool:

        def attempt(group: list[Cell]) -> int:
            names = [fingerprint(cell.config) for cell in group]
            for name, cell in zip(names, group, strict=True):
                display.started(name, cell.labels, cell.config.train.steps)
            return backend.run([str(file), str(out), str(seen), *names], out / f"{names[0]}.log")

        running: dict[Future[int], list[Cell]] = {pool.submit(attempt, group): group for group in groups}
        try:
            while running:
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    status = future.result()
                    for cell in running.pop(future):
                        name = fingerprint(cell.config)
                        path = out / name / "row.json"
                        row = json.loads(path.read_text()) if path.exists() else None
                        display.ended(name, status, row)
                        yield cell, status, row
                display.refresh()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            backend.stop()
            raise


def row_of(cell: Cell, folder: Path) -> Row:
    """What a finished run's log says of it."""
    log = read_log(folder / "log.jsonl")
    (begun, *_), last = [row for row in log if row["kind"] == "run"], log[-1]["step"]
    evaluations = {row["split"]: row for row in log if row["kind"] == "eval" and row["step"] == last}
    metrics = {split: {k: v for k, v in row.items() if k not in _OWN} for split, row in evaluations.items()}
    trained = [row for row in log if row["kind"] == "train"]
    told = {name: begun.get(name) for name in _TOLD}
    skipped = trained[-1].get("skipped", 0) if trained else 0
    own = {"config": fingerprint(cell.config), **metrics, "skipped": skipped, "seconds": round(log[-1]["seconds"], 1)}
    return {**cell.labels, **own, **told}


_OWN = ("kind", "step", "fingerprint", "seconds", "split")
_TOLD = ("chance", "parameters", "state_bytes", "device", "cpus", "jax", "commit")


def further_rates(found: Mapping[float, float], factor: float = 2.0, finest: float = math.sqrt(2)) -> tuple[float, ...]:
    """Learning rates to try next, ascending, given the accuracy of those tried; none where the best one is settled.

    Beyond the edge of the grid by `factor` while the best stands there, then between the best and its neighbours
    until they are within `finest` of it.
    """
    if not found:
        raise ValueError("no rate has been tried yet; begin with a grid")
    rates = sorted(found)
    best = max(rates, key=lambda rate: found[rate])
    at = rates.index(best)
    wanted = []
    for neighbour, beyond in ((at - 1, best / factor), (at + 1, best * factor)):
        if not 0 <= neighbour < len(rates):
            wanted.append(beyond)
        elif max(rates[neighbour] / best, best / rates[neighbour]) > finest * (1 + 1e-9):
            wanted.append(math.sqrt(rates[neighbour] * best))
    return tuple(sorted(float(f"{rate:.6g}") for rate in wanted))
