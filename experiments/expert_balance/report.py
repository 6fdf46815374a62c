"""The table of the arms, from the rows."""

import math
from pathlib import Path

from experiments.expert_balance.sweep import BALANCES, SIZES
from experiments.train_cell import ResultRow

COLUMNS = {
    "entropy of the mean, nats": "expert_entropy",
    "of a token": "expert_token_entropy",
    "deviation of shares": "expert_usage_deviation",
    "chunks like the one before": "expert_repeats",
}


def main(rows: list[ResultRow], folder: Path) -> None:
    (folder / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


def table(rows: list[ResultRow]) -> str:
    """Means over the two layers, each seed."""
    header = ["experts", "balance", "even", *COLUMNS, "valid"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for size, (experts, _) in SIZES.items():
        for balance in BALANCES:
            own = [row for row in rows if row["mixer"] == size and row["balance"] == balance]
            cells = [size, balance, f"{math.log(experts):.2f}"]
            for name in COLUMNS.values():
                cells.append(" ".join(f"{row['diagnostic/' + name]:.3f}" for row in own))
            cells.append(" ".join(f"{row['valid']['accuracy']:.3f}" for row in own))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
