"""Checked-in result rows: reading them, selecting the best one, and writing a report's table."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from recallax.external_file import read_json_lines
from recallax.sweep import ResultRow
from recallax.train.log import finite_number


def read_rows(folder: Path, name: str = "results.jsonl") -> list[ResultRow]:
    """Read the rows of an experiment.

    Args:
        folder: The experiment's folder.
        name: A JSON-lines file in it.

    Returns:
        The rows in the order of the file; none if the file does not exist.

    Raises:
        SystemExit: A line is not a row; the message names the file and the line.
    """
    path = folder / name
    try:
        return read_json_lines(path, {}) if path.exists() else []
    except ValueError as error:
        sys.exit(str(error))


def accuracy_or_nan(row: ResultRow, split: str) -> float:
    """Return the accuracy of a row on a split; NaN if it is missing or not finite, as that of a run that diverged."""
    accuracy = finite_number(row.get(split, {}).get("accuracy"))
    return math.nan if accuracy is None else accuracy


def best_row(rows: list[ResultRow], stage: str, **labels: str | int | float) -> ResultRow:
    """Select the row with the highest accuracy on the valid split.

    Args:
        rows: Rows of a sweep.
        stage: The stage that the row must belong to.
        **labels: Further entries that the row must have, such as `mixer="based 4"`.

    Returns:
        The best row. A row without a finite accuracy is worse than all others.

    Raises:
        ValueError: No row has these labels.
    """
    candidates = [r for r in rows if r["stage"] == stage and all(r[k] == v for k, v in labels.items())]
    if not candidates:
        raise ValueError(f"no row of stage {stage!r} has {labels}; run the sweep first")
    return max(candidates, key=lambda row: rank(accuracy_or_nan(row, "valid")))


def rank(accuracy: float) -> float:
    """Return a key that orders accuracies, with NaN below all others."""
    return -math.inf if math.isnan(accuracy) else accuracy


def markdown_row(cells: Sequence[object]) -> str:
    """Format one line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def write_table(table: str, folder: Path) -> None:
    """Write an experiment's `table.md` and print it."""
    (folder / "table.md").write_text(table + "\n")
    print(table)
