"""Table of the sweep: `python -m experiments.workspace_needle.report` rewrites table.md."""

from pathlib import Path

from experiments.lr_grid_table import lr_grid_table
from experiments.results import read_rows, write_table
from experiments.workspace_needle.sweep import PATTERNS, RATES
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format accuracy by learning rate and seed."""
    return lr_grid_table(rows, PATTERNS, RATES)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
