"""One cell of a sweep, in a process of its own: `python -m recallax.train.sweep_cell FILE OUT ROWS FINGERPRINT`."""

import json
import os
import sys
from pathlib import Path

from recallax.config import ConfigError, fingerprint
from recallax.train.checkpoint import Checkpoints
from recallax.train.loop import Interrupted, train
from recallax.train.program import Program
from recallax.train.run_folder import write_atomic
from recallax.train.sweep import Cell, Row, row_of, rows_of, stages_of


def attempt(arguments: list[str]) -> int:
    """Train the cell that the arguments name; 0, or `os.EX_TEMPFAIL` if it was asked to stop and can go on."""
    file, out, seen, wanted = arguments
    try:
        train_cell(Path(file), Path(out), int(seen), wanted)
    except Interrupted as stop:
        print(stop, flush=True)
        return os.EX_TEMPFAIL
    return 0


def train_cell(file: Path, out: Path, seen: int, wanted: str) -> None:
    """Train a cell in its folder, or go on there, and write its row."""
    cell = _cell(file, wanted, list(rows_of(out).values())[:seen])
    folder = out / wanted
    train(cell.config, folder, name=" ".join(str(value) for value in cell.labels.values()))
    row = row_of(cell, folder)
    if cell.probe is not None:
        program = Program(cell.config)
        with Checkpoints(folder / "checkpoints", keep=None) as checkpoints:
            restored = checkpoints.restore(program.abstract)
        assert restored is not None
        row |= cell.probe(program, restored.state)
    write_atomic(folder / "row.json", json.dumps(row))


def _cell(file: Path, wanted: str, rows: list[Row]) -> Cell:
    """The file is asked as the sweep has asked it, since a cell may hold what no JSON gives back."""
    for stage in stages_of(file):
        for cell in stage(rows):
            if fingerprint(cell.config) == wanted:
                return cell
    raise ConfigError(f"{file} has no cell {wanted} any more; start the sweep again")


if __name__ == "__main__":
    sys.exit(attempt(sys.argv[1:]))
