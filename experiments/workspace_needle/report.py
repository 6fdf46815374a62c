"""The table of the arms, from the rows."""

from pathlib import Path

from experiments.lr_grid_table import lr_grid_table
from experiments.train_cell import ResultRow
from experiments.workspace_needle.sweep import PATTERNS, RATES


def main(rows: list[ResultRow], folder: Path) -> None:
    text = lr_grid_table(rows, PATTERNS, RATES)
    (folder / "table.md").write_text(text + "\n")
    print(text)
