"""The table of the arms, from the rows."""

from pathlib import Path

from experiments.hydra_curriculum.sweep import RATES, VARIANTS
from experiments.lr_grid_table import lr_grid_table
from experiments.train_cell import ResultRow


def main(rows: list[ResultRow], folder: Path) -> None:
    text = lr_grid_table(rows, VARIANTS, RATES)
    (folder / "table.md").write_text(text + "\n")
    print(text)
