"""The tables of Hydra's parts, a task each, from the rows."""

from pathlib import Path

from experiments.hydra_parts.sweep import RATES, VARIANTS
from experiments.lr_grid_table import lr_grid_table
from experiments.train_cell import ResultRow


def main(rows: list[ResultRow], folder: Path) -> None:
    tables = [
        f"{task}\n\n" + lr_grid_table([r for r in rows if r["task"] == task], VARIANTS[task], RATES)
        for task in VARIANTS
    ]
    text = "\n\n".join(tables)
    (folder / "table.md").write_text(text + "\n")
    print(text)
