"""The table of Hydra's parts, from the rows."""

from pathlib import Path

from experiments.cell import Row
from experiments.hydra_parts.sweep import PATTERNS, RATES
from experiments.rates_table import rates_table


def main(rows: list[Row], folder: Path) -> None:
    text = rates_table(rows, PATTERNS, RATES)
    (folder / "table.md").write_text(text + "\n")
    print(text)
