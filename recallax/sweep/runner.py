"""The sweep runner: trains the trials of a Python file, each in its own run folder.

    OUT/<fingerprint>/            a run folder like any other; report, eval and a second sweep read it
    OUT/<fingerprint>/row.json    the result of the run, written last: a folder that has it is finished
    OUT/<fingerprint>.log         the output of all attempts
    OUT/results.jsonl             the rows, in the order in which runs ended

A stage is called again after its trials have ended, until it returns no new ones. A grid can thus grow around its best
value (`refine_learning_rates`). Every trial is trained in its own process, which the backend places, so that a crash
ends only that trial. A failed trial is retried and resumes from its last checkpoint. A trial that was stopped is also
resumed, and does not count as failed. The sweep waits for a trial whose folder another process uses, such as a worker
of a sweep that was killed a moment ago.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from recallax.config import ConfigError, fingerprint, require_at_least
from recallax.paths import reject_links
from recallax.sweep.backends.backend import EXIT_IN_USE, Backend
from recallax.sweep.display import SweepDisplay
from recallax.sweep.process_signals import interrupted_by_signals
from recallax.sweep.results import is_finished, read_results, read_row, write_results
from recallax.sweep.sweep_file import load_stages
from recallax.sweep.trial import ResultRow, SweepStage, Trial
from recallax.train.run_folder import find_folder_user
from recallax.train.vmapped_runs import check_vmappable, without_seeds

REFRESH_SECONDS = 1.0
"""Seconds between updates of the display, and between checks of folders that other processes use."""
IN_USE_SECONDS = 10.0
"""Seconds until trials are started again whose workers found all folders in use."""


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
        ConfigError: An argument is below its minimum, the file has no stages or they fail, a file of results is
            damaged, or trials cannot be trained at once.
        SymlinkError: A symbolic link in `out` leads out of it.
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the workers were stopped, and saved their runs.
    """
    require_at_least(0, retries=retries)
    require_at_least(1, vmap_seeds=vmap_seeds)
    stages = load_stages(file)
    out.mkdir(parents=True, exist_ok=True)
    reject_links(out)
    rows = read_results(out)
    write_results(rows.values(), out)
    with interrupted_by_signals(), SweepDisplay(out) as display:
        runner = _SweepRunner(file, out, backend, display, retries, vmap_seeds, rows)
        for number, stage in enumerate(stages, 1):
            failed = runner.run_stage(stage, number, len(stages))
            if failed:
                logs = [out / f"{name}.log" for name in failed]  # trials that were trained at once share a log
                display.print_line(f"{len(failed)} failed: {', '.join(str(log) for log in logs if log.exists())}")
                return len(failed)
    return 0


@dataclass
class _SweepRunner:
    """A sweep that is running; the fields are those of `run_sweep`."""

    file: Path
    out: Path
    backend: Backend
    display: SweepDisplay
    retries: int
    vmap_seeds: int
    rows: dict[str, ResultRow]
    """Result rows by the fingerprint of their config."""

    def run_stage(self, stage: SweepStage, number: int, num_stages: int) -> list[str]:
        """Train the trials of a stage until it returns no new ones; returns the names of those that failed."""
        attempts: Counter[str] = Counter()
        while pending := self._pending_trials(stage, attempts):
            if self._collect_rows(pending):
                continue
            free = [trial for trial in pending if not self._runs_elsewhere(trial)]
            if not free:
                self._wait_for_any(pending)
                continue
            self.display.start_stage(number, num_stages, len(free))
            statuses: set[int] = set()
            for trial, status, row in self._run_trials(_group_by_seed(free, self.vmap_seeds)):
                statuses.add(status)
                attempts[fingerprint(trial.config)] += status not in (os.EX_TEMPFAIL, EXIT_IN_USE)
                if row is not None:
                    self._add_row(row)
            if statuses == {EXIT_IN_USE}:  # by processes whose locks cannot be seen from here
                time.sleep(IN_USE_SECONDS)
        return [name for name in attempts if name not in self.rows]

    def _pending_trials(self, stage: SweepStage, attempts: Counter[str]) -> list[Trial]:
        """Return the trials that are neither finished nor out of retries; one of those with equal configs."""
        trials = {fingerprint(trial.config): trial for trial in stage(list(self.rows.values()))}
        return [
            trial
            for name, trial in trials.items()
            if not is_finished(trial.config, self.rows) and attempts[name] <= self.retries
        ]

    def _collect_rows(self, pending: list[Trial]) -> bool:
        """Add the rows of trials that other processes have finished; returns True if there are any."""
        found = [row for trial in pending if (row := self._read_row(fingerprint(trial.config))) is not None]
        for row in found:
            self._add_row(row)
        return bool(found)

    def _read_row(self, name: str) -> ResultRow | None:
        """Return the row of a finished trial; None, with a message if it cannot be read, for any other trial."""
        path = self.out / name / "row.json"
        if not path.exists():
            return None
        try:
            row = read_row(path)
        except (ConfigError, OSError) as error:
            self.display.print_line(str(error))
            return None
        return row if row["config"] == name else None

    def _add_row(self, row: ResultRow) -> None:
        self.rows[row["config"]] = row
        write_results(self.rows.values(), self.out)

    def _runs_elsewhere(self, trial: Trial) -> bool:
        """Return True, and announce it, if another process uses the folder of a trial."""
        name = fingerprint(trial.config)
        process = find_folder_user(self.out / name)
        if process is not None:
            self.display.trial_running_elsewhere(name, trial.labels, process)
        return process is not None

    def _wait_for_any(self, trials: list[Trial]) -> None:
        """Wait until no other process uses the folder of one of the trials."""
        while all(self._runs_elsewhere(trial) for trial in trials):
            self.display.refresh()
            time.sleep(REFRESH_SECONDS)

    def _run_trials(self, groups: list[list[Trial]]) -> Iterator[tuple[Trial, int, ResultRow | None]]:
        """Run one worker per group; yield each trial when its worker ends, the exit status, and the row if it finished.

        The worker calls the stages with the rows so far, as this process did, to find its trials.
        """
        num_rows = len(self.rows)
        with ThreadPoolExecutor(self.backend.workers) as pool:
            try:
                running = {pool.submit(self._run_group, group, num_rows): group for group in groups}
                while running:
                    done, _ = wait(running, timeout=REFRESH_SECONDS, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield from self._end_group(future, running.pop(future))
                    self.display.refresh()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.backend.stop()
                raise

    def _run_group(self, group: list[Trial], num_rows: int) -> int:
        """Run a worker for a group of trials in a thread of the pool; returns its exit status."""
        names = [fingerprint(trial.config) for trial in group]
        for name, trial in zip(names, group, strict=True):
            self.display.trial_started(name, trial.labels, trial.config.train.steps)
        log = self.out / f"{names[0]}.log"
        try:
            return self.backend.run([str(self.file), str(self.out), str(num_rows), *names], log)
        except OSError as error:  # the log cannot be written, or no process can be started
            self.display.print_line(f"{log}: {error}")
            return 1

    def _end_group(self, future: Future[int], group: list[Trial]) -> Iterator[tuple[Trial, int, ResultRow | None]]:
        status = future.result()
        for trial in group:
            name = fingerprint(trial.config)
            row = self._read_row(name)
            self.display.trial_ended(name, status, row)
            yield trial, status, row


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
