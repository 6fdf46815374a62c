"""Table of the sweep: `python -m experiments.expert_balance.report` rewrites table.md."""

import math
from pathlib import Path

from experiments.expert_balance.sweep import BALANCES, SIZES
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent
COLUMNS = {
    "entropy of the mean, nats": "expert_entropy",
    "of a token": "expert_token_entropy",
    "deviation of shares": "expert_usage_deviation",
    "chunks like the one before": "expert_repeats",
}
"""Column title to diagnostic, a mean over the two layers."""


def table(rows: list[ResultRow]) -> str:
    """Format one line per number of experts and balance method: diagnostics and accuracy of each seed."""
    header = ["experts", "balance", "even", *COLUMNS, "valid"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for size, (num_experts, _) in SIZES.items():
        for balance in BALANCES:
            own = [row for row in rows if row["mixer"] == size and row["balance"] == balance]
            diagnostics = [" ".join(f"{row['diagnostic/' + name]:.3f}" for row in own) for name in COLUMNS.values()]
            accuracy = " ".join(f"{row['valid']['accuracy']:.3f}" for row in own)
            lines.append(markdown_row([size, balance, f"{math.log(num_experts):.2f}", *diagnostics, accuracy]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
