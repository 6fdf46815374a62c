"""Sweeps: a Python file that yields configs, a run folder for each, and a row for each that is finished.

    OUT/<fingerprint>/        a run folder like any other; report, eval and a second sweep read it
    OUT/<fingerprint>/row.json    what the run came to, written last: a folder that has it is finished
    OUT/<fingerprint>.log     what the run printed, of all attempts
    OUT/results.jsonl         the rows, in the order in which runs ended

The file has `NUM_KEY_STAGES`, functions from the rows so far to cells. A stage is asked again whenever its cells have ended,
until it has no new ones: so a grid can grow around its best (`refine_learning_rates`). Each cell is trained in a process of its
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
from recallax.sweep.backends.local import Backend
from recallax.sweep.display import SweepDisplay
from recallax.train.log import read_log
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import write_atomic
from recallax.train.vmapped_runs import check_vmappable, without_seeds

type ResultRow = dict[str, Any]
type SweepStage = Callable[[list[ResultRow]], list["Trial"]]
"""Cells to train, given the rows so far."""


@dataclass(frozen=True)
class Trial:
    """A config, and what a report calls it."""

    labels: Mapping[str, str | int | float]
    config: RunConfig
    extra_metrics: Callable[..., ResultRow] | None = None
    """What else to measure of the trained model, from its `Program` and `TrainState`; its entries join the row."""


def load_stages(file: Path) -> list[SweepStage]:
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
    stages = getattr(module, "NUM_KEY_STAGES", None)
    if not stages or not all(callable(stage) for stage in stages):
        raise ConfigError(f"{file} has no STAGES; it must be a list of functions from rows to cells")
    return list(stages)


def sweep(file: Path, out: Path, backend: Backend, *, retries: int = 1, vmap_seeds: int = 1) -> int:
    """Train every cell that has no row yet; the number of those that failed for good, which end the sweep's stage.

    together: seeds of one config that one process trains at once, at most; ConfigError for what cannot be.
    """
    if vmap_seeds < 1:
        raise ConfigError(f"{vmap_seeds} seeds at once train nothing; 1 trains each seed alone")
    stages = load_stages(file)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_results(out)
    _write_rows(rows, out)
    with SweepDisplay(out) as display:
        for number, stage in enumerate(stages, 1):
            attempts: Counter[str] = Counter()
            while todo := _pending_trials(stage, rows, attempts, retries):
                display.start_stage(number, len(stages), len(todo))
                for cell, status, row in _run_trials(
                    _group_by_seed(todo, vmap_seeds), (file, out, len(rows)), backend, display
                ):
                    attempts[fingerprint(cell.config)] += status != os.EX_TEMPFAIL
                    if row is not None:
                        rows[row["config"]] = row
                        _write_rows(rows, out)
            failed = [name for name in attempts if name not in rows]
            if failed:
                logs = [out / f"{name}.log" for name in failed]  # those that trained at once share one
                display.note(f"{len(failed)} failed: {', '.join(str(log) for log in logs if log.exists())}")
                return len(failed)
    return 0


def read_results(out: Path) -> dict[str, ResultRow]:
    """The rows of a sweep, by fingerprint; those of runs that ended while nobody watched come last."""
    file = out / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    listed = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have torn the last
    ended = [json.loads(path.read_text()) for path in sorted(out.glob("*/row.json"))]
    rows = {row["config"]: row for row in listed}
    return rows | {row["config"]: row for row in ended if row["config"] not in rows}


def _write_rows(rows: Mapping[str, ResultRow], out: Path) -> None:
    write_atomic(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))


def _pending_trials(
    stage: SweepStage, rows: Mapping[str, ResultRow], attempts: Counter[str], retries: int
) -> list[Trial]:
    found = {fingerprint(cell.config): cell for cell in stage(list(rows.values()))}
    return [cell for name, cell in found.items() if name not in rows and attempts[name] <= retries]


def _group_by_seed(trials: list[Trial], vmap_seeds: int) -> list[list[Trial]]:
    """The cells that one process trains: one each, or seeds of one config. Raises ConfigError if they cannot be."""
    alike: dict[str, list[Trial]] = {}
    for cell in trials:
        own = without_seeds(cell.config) if vmap_seeds > 1 else cell.config
        alike.setdefault(fingerprint(own), []).append(cell)
    groups = [found[i : i + vmap_seeds] for found in alike.values() for i in range(0, len(found), vmap_seeds)]
    for group in groups:
        if len(group) > 1:
            check_vmappable([cell.config for cell in group])
    return groups


def _run_trials(
    groups: list[list[Trial]], request: tuple[Path, Path, int], backend: Backend, display: SweepDisplay
) -> Iterator[tuple[Trial, int, ResultRow | None]]:
    """Each cell as its process ends, the exit status of that, and the cell's row if it is finished.

    asked: the file, the folder, and how many rows the stage has seen.
    """
    file, out, seen = request
    with ThreadPoolExecutor(backend.workers) as pool:

        def attempt(group: list[Trial]) -> int:
            names = [fingerprint(cell.config) for cell in group]
            for name, cell in zip(names, group, strict=True):
                display.trial_started(name, cell.labels, cell.config.train.steps)
            return backend.run([str(file), str(out), str(seen), *names], out / f"{names[0]}.log")

        running: dict[Future[int], list[Trial]] = {pool.submit(attempt, group): group for group in groups}
        try:
            while running:
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    status = future.result()
                    for cell in running.pop(future):
                        name = fingerprint(cell.config)
                        path = out / name / "row.json"
                        row = json.loads(path.read_text()) if path.exists() else None
                        display.trial_ended(name, status, row)
                        yield cell, status, row
                display.refresh()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            backend.stop()
            raise


def result_row(trial: Trial, folder: Path) -> ResultRow:
    """What a finished run's log says of it."""
    log = read_log(folder / "log.jsonl")
    (begun, *_), last = [row for row in log if row["kind"] == "run"], log[-1]["step"]
    evaluations = {row["split"]: row for row in log if row["kind"] == "eval" and row["step"] == last}
    metrics = {split: {k: v for k, v in row.items() if k not in _LOG_KEYS} for split, row in evaluations.items()}
    trained = [row for row in log if row["kind"] == "train"]
    told = {name: begun.get(name) for name in _RUN_INFO_KEYS}
    skipped = trained[-1].get("skipped", 0) if trained else 0
    own = {"config": fingerprint(trial.config), **metrics, "skipped": skipped, "seconds": round(log[-1]["seconds"], 1)}
    return {**trial.labels, **own, **told}


_LOG_KEYS = ("kind", "step", "fingerprint", "seconds", "split")
_RUN_INFO_KEYS = ("chance", "parameters", "state_bytes", "device", "cpus", "jax", "commit")


def refine_learning_rates(
    accuracy_by_rate: Mapping[float, float], expand_factor: float = 2.0, min_ratio: float = math.sqrt(2)
) -> tuple[float, ...]:
    """Learning rates to try next, ascending, given the accuracy of those tried; none where the best one is settled.

    Beyond the edge of the grid by `expand_factor` while the best stands there, then between the best and its neighbours
    until they are within `min_ratio` of it.
    """
    if not accuracy_by_rate:
        raise ValueError("no rate has been tried yet; begin with a grid")
    rates = sorted(accuracy_by_rate)
    best = max(rates, key=lambda rate: accuracy_by_rate[rate])
    at = rates.index(best)
    wanted = []
    for neighbour, beyond in ((at - 1, best / expand_factor), (at + 1, best * expand_factor)):
        if not 0 <= neighbour < len(rates):
            wanted.append(beyond)
        elif max(rates[neighbour] / best, best / rates[neighbour]) > min_ratio * (1 + 1e-9):
            wanted.append(math.sqrt(rates[neighbour] * best))
    return tuple(sorted(float(f"{rate:.6g}") for rate in wanted))
