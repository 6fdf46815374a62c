"""The table of the arms, from the rows."""

from pathlib import Path

from experiments.cell import Row
from experiments.rates_table import rates_table
from experiments.staging.sweep import ARMS, RATES


def main(rows: list[Row], folder: Path) -> None:
    text = rates_table(rows, ARMS, RATES)
    (folder / "table.md").write_text(text + "\n")
    print(text)
