"""The sweep runner: trains the trials of a Python file, each in its own run folder.

    OUT/<fingerprint>/            a run folder like any other; report, eval and a second sweep read it
    OUT/<fingerprint>/row.json    the result of the run, written last: a folder that has it is finished
    OUT/<fingerprint>.log         the output of all attempts
    OUT/results.jsonl             the rows, in the order in which runs ended

A stage is called again after its trials have ended, until it returns no new ones. A grid can thus grow around its best
value (`refine_learning_rates`). Every trial is trained in its own process, which the backend places, so that a crash
ends only that trial. A failed trial is retried and resumes from its last checkpoint. A trial that was stopped is also
resumed, and does not count as failed.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from recallax.config import fingerprint, require_at_least
from recallax.sweep.backends.backend import Backend
from recallax.sweep.display import SweepDisplay
from recallax.sweep.results import is_finished, read_results, write_results
from recallax.sweep.trial import ResultRow, SweepStage, Trial, load_stages
from recallax.train.vmapped_runs import check_vmappable, without_seeds

REFRESH_SECONDS = 1.0
"""Seconds between updates of the display."""


def run_sweep(file: Path, out: Path, backend: Backend, *, retries: int = 1, vmap_seeds: int = 1) -> int:
    """Train every trial that has no result yet.

    Args:
        file: Python file with `STAGES`.
        out: Folder of the runs and of `results.jsonl`.
        backend: Runs the worker processes. The caller closes it.
        retries: Number of times that a failed trial is retried.
        vmap_seeds: Maximum number of trials that one process trains at once. They may differ in their seeds only.

    Returns:
        The number of trials of a stage that failed after all retries. The stages after it are then skipped.

    Raises:
        ConfigError: The file has no stages, or trials cannot be trained at once.
    """
    require_at_least(1, vmap_seeds=vmap_seeds)
    stages = load_stages(file)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_results(out)
    write_results(rows.values(), out)
    with SweepDisplay(out) as display:
        for number, stage in enumerate(stages, 1):
            attempts: Counter[str] = Counter()
            while pending := _pending_trials(stage, rows, attempts, retries):
                display.start_stage(number, len(stages), len(pending))
                groups = _group_by_seed(pending, vmap_seeds)
                for trial, status, row in _run_trials(groups, file, out, len(rows), backend, display):
                    attempts[fingerprint(trial.config)] += status != os.EX_TEMPFAIL
                    if row is not None:
                        rows[row["config"]] = row
                        write_results(rows.values(), out)
            failed = [name for name in attempts if name not in rows]
            if failed:
                logs = [out / f"{name}.log" for name in failed]  # trials that were trained at once share a log
                display.print_line(f"{len(failed)} failed: {', '.join(str(log) for log in logs if log.exists())}")
                return len(failed)
    return 0


def _pending_trials(
    stage: SweepStage, rows: Mapping[str, ResultRow], attempts: Counter[str], retries: int
) -> list[Trial]:
    """Return the trials of a stage that are neither finished nor out of retries; one of those with equal configs."""
    trials = {fingerprint(trial.config): trial for trial in stage(list(rows.values()))}
    return [
        trial for name, trial in trials.items() if not is_finished(trial.config, rows) and attempts[name] <= retries
    ]


def _group_by_seed(trials: list[Trial], vmap_seeds: int) -> list[list[Trial]]:
    """Group trials that differ in their seeds only, at most `vmap_seeds` per group. Raises ConfigError."""
    by_config: dict[str, list[Trial]] = {}
    for trial in trials:
        config = without_seeds(trial.config) if vmap_seeds > 1 else trial.config
        by_config.setdefault(fingerprint(config), []).append(trial)
    groups = [alike[i : i + vmap_seeds] for alike in by_config.values() for i in range(0, len(alike), vmap_seeds)]
    for group in groups:
        if len(group) > 1:
            check_vmappable([trial.config for trial in group])
    return groups


def _run_trials(
    groups: list[list[Trial]], file: Path, out: Path, num_rows: int, backend: Backend, display: SweepDisplay
) -> Iterator[tuple[Trial, int, ResultRow | None]]:
    """Run one worker per group; yield each trial when its worker ends, the exit status, and the row if it is finished.

    The worker calls the stages with the first `num_rows` rows, as this process did, to find its trials.
    """
    with ThreadPoolExecutor(backend.workers) as pool:

        def run_group(group: list[Trial]) -> int:
            names = [fingerprint(trial.config) for trial in group]
            for name, trial in zip(names, group, strict=True):
                display.trial_started(name, trial.labels, trial.config.train.steps)
            return backend.run([str(file), str(out), str(num_rows), *names], out / f"{names[0]}.log")

        running: dict[Future[int], list[Trial]] = {pool.submit(run_group, group): group for group in groups}
        try:
            while running:
                done, _ = wait(running, timeout=REFRESH_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    status = future.result()
                    for trial in running.pop(future):
                        name = fingerprint(trial.config)
                        path = out / name / "row.json"
                        row = json.loads(path.read_text()) if path.exists() else None
                        display.trial_ended(name, status, row)
                        yield trial, status, row
                display.refresh()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            backend.stop()
            raise
