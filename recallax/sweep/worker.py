"""Worker process of a sweep: `python -m recallax.sweep.worker PARENT FILE OUT NUM_ROWS FINGERPRINT...`.

PARENT is the id of the process that starts the worker, and with which it ends. It trains one trial, or several that
differ in their seeds only and are trained at once.
"""

import os
import sys
import traceback
from pathlib import Path

from recallax.atomic_files import write_atomic
from recallax.config import ConfigError, fingerprint
from recallax.sweep.backends.backend import EXIT_IN_USE
from recallax.sweep.process_signals import end_with_parent
from recallax.sweep.results import add_extra_metrics, encode_row, read_results, result_row
from recallax.sweep.sweep_file import load_stages
from recallax.sweep.trial import ResultRow, Trial
from recallax.terminal import escaped_output
from recallax.train.loop import restore_run, train
from recallax.train.metrics_logger import NonFiniteError
from recallax.train.run_folder import RunFolderInUseError
from recallax.train.stop_signals import Interrupted
from recallax.train.vmapped_runs import train_vmapped
from recallax.train.watchdog import HANG_SECONDS


def run_worker(arguments: list[str]) -> int:
    """Train the trials that the command line names.

    Args:
        arguments: The sweep file, the folder of the sweep, the number of rows that the stages were called with, and the
            fingerprints of the trials' configs.

    Returns:
        0, or 1 if a trial failed; `os.EX_TEMPFAIL` if the run was stopped and can be resumed; `EXIT_IN_USE` if another
        process uses its folder.
    """
    file, out, num_rows, *fingerprints = arguments
    try:
        return min(1, train_trials(Path(file), Path(out), int(num_rows), fingerprints))
    except Interrupted as stop:
        print(stop, flush=True)
        return os.EX_TEMPFAIL
    except RunFolderInUseError as error:
        print(error, flush=True)
        return EXIT_IN_USE


def train_trials(file: Path, out: Path, num_rows: int, fingerprints: list[str]) -> int:
    """Train trials in their run folders, or resume them there, and write their rows.

    Args:
        file: The sweep file.
        out: Folder of the sweep.
        num_rows: Number of rows that the stages were called with.
        fingerprints: Fingerprints of the trials' configs.

    Returns:
        The number of trials that failed beside others.

    Raises:
        ConfigError: The sweep file yields no such trial.
        NonFiniteError: The only trial failed.
        RunFolderInUseError: Another process uses the folder of a trial.
    """
    rows = list(read_results(out).values())[:num_rows]
    trials = [_find_trial(file, name, rows) for name in fingerprints]
    folders = [out / name for name in fingerprints]
    names = [" ".join(str(value) for value in trial.labels.values()) for trial in trials]
    errors: list[NonFiniteError | None] = [None]
    if len(trials) == 1:
        train(trials[0].config, folders[0], name=names[0], hang_seconds=HANG_SECONDS)
    else:
        errors = train_vmapped([trial.config for trial in trials], folders, names, hang_seconds=HANG_SECONDS)
    num_failed = 0
    for trial, folder, error in zip(trials, folders, errors, strict=True):
        try:
            if error is not None:
                raise error
            _write_result_row(trial, folder)
        except Exception:  # also of `extra_metrics`, which must not affect the rows of the others
            print(f"{folder.name} failed:\n{traceback.format_exc()}", flush=True)
            num_failed += 1
    return num_failed


def _write_result_row(trial: Trial, folder: Path) -> None:
    """Compute the extra metrics of a trained run, and write its row, which marks the run as finished."""
    row = result_row(trial, folder)
    if trial.extra_metrics is not None:
        program, restored = restore_run(folder)
        row = add_extra_metrics(row, trial.extra_metrics(program, restored.state))
    write_atomic(folder / "row.json", encode_row(row))


def _find_trial(file: Path, trial_fingerprint: str, rows: list[ResultRow]) -> Trial:
    """Find a trial by calling the stages, as the sweep did: a trial may hold functions, which JSON cannot store."""
    for stage in load_stages(file):
        for trial in stage(rows):
            if fingerprint(trial.config) == trial_fingerprint:
                return trial
    raise ConfigError(f"{file} has no trial {trial_fingerprint} any more; start the sweep again")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    with escaped_output():
        sys.exit(run_worker(sys.argv[2:]))
