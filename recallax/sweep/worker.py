"""A cell of a sweep in a process of its own: `python -m recallax.sweep.worker FILE OUT ROWS FINGERPRINT...`.

Several, which may differ in their seeds alone, are trained at once.
"""

import json
import os
import sys
from pathlib import Path

from recallax.config import ConfigError, fingerprint
from recallax.sweep.runner import ResultRow, Trial, load_stages, read_results, result_row
from recallax.train.checkpoint import Checkpoints
from recallax.train.loop import train
from recallax.train.metrics_logger import NonFiniteError
from recallax.train.program import Program
from recallax.train.run_folder import write_atomic
from recallax.train.stop_signals import Interrupted
from recallax.train.vmapped_runs import train_vmapped


def run_worker(arguments: list[str]) -> int:
    """Train the cells that the arguments name, several at once; 0, or `os.EX_TEMPFAIL` if they can go on."""
    file, out, seen, *wanted = arguments
    try:
        return train_trials(Path(file), Path(out), int(seen), wanted)
    except Interrupted as stop:
        print(stop, flush=True)
        return os.EX_TEMPFAIL


def train_trials(file: Path, out: Path, num_rows: int, fingerprints: list[str]) -> int:
    """Train cells in their folders, or go on there, and write their rows; how many seeds failed beside others."""
    rows = list(read_results(out).values())[:num_rows]
    cells = [_find_trial(file, name, rows) for name in fingerprints]
    folders = [out / name for name in fingerprints]
    names = [" ".join(str(value) for value in cell.labels.values()) for cell in cells]
    errors: list[NonFiniteError | None] = [None]
    if len(cells) == 1:
        train(cells[0].config, folders[0], name=names[0])
    else:
        errors = train_vmapped([cell.config for cell in cells], folders, names)
    for cell, folder, error in zip(cells, folders, errors, strict=True):
        if error is None:
            _write_result_row(cell, folder)
        else:
            print(f"{folder.name}: {error}", flush=True)
    return sum(error is not None for error in errors)


def _write_result_row(trial: Trial, folder: Path) -> None:
    """Probe what was trained, and write the row, which says that the run is finished."""
    row = result_row(trial, folder)
    if trial.extra_metrics is not None:
        program = Program(trial.config)
        with Checkpoints(folder / "checkpoints", max_to_keep=None) as checkpoints:
            restored = checkpoints.restore(program.abstract_state)
        assert restored is not None
        row |= trial.extra_metrics(program, restored.state)
    write_atomic(folder / "row.json", json.dumps(row))


def _find_trial(file: Path, trial_fingerprint: str, rows: list[ResultRow]) -> Trial:
    """The file is asked as the sweep has asked it, since a cell may hold what no JSON gives back."""
    for stage in load_stages(file):
        for cell in stage(rows):
            if fingerprint(cell.config) == trial_fingerprint:
                return cell
    raise ConfigError(f"{file} has no cell {trial_fingerprint} any more; start the sweep again")


if __name__ == "__main__":
    sys.exit(run_worker(sys.argv[1:]))
