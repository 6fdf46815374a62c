"""The tables of Hydra's parts, a task each, from the rows."""

from pathlib import Path

from experiments.cell import Row
from experiments.hydra_parts.sweep import ARMS, RATES
from experiments.rates_table import rates_table


def main(rows: list[Row], folder: Path) -> None:
    tables = [f"{task}\n\n" + rates_table([r for r in rows if r["task"] == task], ARMS[task], RATES) for task in ARMS]
    text = "\n\n".join(tables)
    (folder / "table.md").write_text(text + "\n")
    print(text)
