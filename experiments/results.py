"""Checked-in result rows: reading them, selecting the best one, and writing a report's table."""

import json
from collections.abc import Sequence
from pathlib import Path

from recallax.sweep import ResultRow


def read_rows(folder: Path, name: str = "results.jsonl") -> list[ResultRow]:
    """Read the rows of an experiment.

    Args:
        folder: The experiment's folder.
        name: A JSON-lines file in it.

    Returns:
        The rows in the order of the file; none if the file does not exist.
    """
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_row(rows: list[ResultRow], stage: str, **labels: str | int | float) -> ResultRow:
    """Select the row with the highest accuracy on the valid split.

    Args:
        rows: Rows of a sweep.
        stage: The stage that the row must belong to.
        **labels: Further entries that the row must have, such as `mixer="based 4"`.

    Returns:
        The best row.

    Raises:
        ValueError: No row has these labels.
    """
    candidates = [r for r in rows if r["stage"] == stage and all(r[k] == v for k, v in labels.items())]
    if not candidates:
        raise ValueError(f"no row of stage {stage!r} has {labels}; run the sweep first")
    return max(candidates, key=lambda r: r["valid"]["accuracy"])


def markdown_row(cells: Sequence[object]) -> str:
    """Format one line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def write_table(table: str, folder: Path) -> None:
    """Write an experiment's `table.md` and print it."""
    (folder / "table.md").write_text(table + "\n")
    print(table)
