"""A cell of a sweep in a process of its own: `python -m recallax.train.sweep_cell FILE OUT ROWS FINGERPRINT...`.

Several, which may differ in their seeds alone, are trained at once.
"""

import json
import os
import sys
from pathlib import Path

from recallax.config import ConfigError, fingerprint
from recallax.train.checkpoint import Checkpoints
from recallax.train.loop import train
from recallax.train.meter import NonFiniteError
from recallax.train.program import Program
from recallax.train.run_folder import write_atomic
from recallax.train.seeds import train_seeds
from recallax.train.signals import Interrupted
from recallax.train.sweep import Cell, Row, row_of, rows_of, stages_of


def attempt(arguments: list[str]) -> int:
    """Train the cells that the arguments name, several at once; 0, or `os.EX_TEMPFAIL` if they can go on."""
    file, out, seen, *wanted = arguments
    try:
        return train_cells(Path(file), Path(out), int(seen), wanted)
    except Interrupted as stop:
        print(stop, flush=True)
        return os.EX_TEMPFAIL


def train_cells(file: Path, out: Path, seen: int, wanted: list[str]) -> int:
    """Train cells in their folders, or go on there, and write their rows; how many seeds failed beside others."""
    rows = list(rows_of(out).values())[:seen]
    cells = [_cell(file, name, rows) for name in wanted]
    folders = [out / name for name in wanted]
    names = [" ".join(str(value) for value in cell.labels.values()) for cell in cells]
    errors: list[NonFiniteError | None] = [None]
    if len(cells) == 1:
        train(cells[0].config, folders[0], name=names[0])
    else:
        errors = train_seeds([cell.config for cell in cells], folders, names)
    for cell, folder, error in zip(cells, folders, errors, strict=True):
        if error is None:
            _finish(cell, folder)
        else:
            print(f"{folder.name}: {error}", flush=True)
    return sum(error is not None for error in errors)


def _finish(cell: Cell, folder: Path) -> None:
    """Probe what was trained, and write the row, which says that the run is finished."""
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
