"""Table of the sweep: `python -m experiments.hydra_curriculum.report` rewrites table.md."""

from pathlib import Path

from experiments.hydra_curriculum.sweep import RATES, VARIANTS
from experiments.lr_grid_table import lr_grid_table
from experiments.results import read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format accuracy by learning rate and seed."""
    return lr_grid_table(rows, VARIANTS, RATES)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
