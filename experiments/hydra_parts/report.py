"""Table of the sweep: `python -m experiments.hydra_parts.report` rewrites table.md."""

from pathlib import Path

from experiments.hydra_parts.sweep import RATES, VARIANTS
from experiments.lr_grid_table import lr_grid_table
from experiments.results import read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format one table per task: accuracy by learning rate and seed."""
    return "\n\n".join(
        f"{task}\n\n" + lr_grid_table([row for row in rows if row["task"] == task], names, RATES)
        for task, names in VARIANTS.items()
    )


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
