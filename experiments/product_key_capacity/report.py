"""Table of the sweep: `python -m experiments.product_key_capacity.report` rewrites table.md."""

from pathlib import Path

import numpy as np

from experiments.product_key_capacity.sweep import VARIANTS
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format one line per variant: recall of each seed, and means over seeds."""
    header = ["variant", "parameters", "recall, each seed", "slots used", "KL to equal use"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in VARIANTS:
        own = sorted((row for row in rows if row["mixer"] == name), key=lambda row: row["seed"])
        recall = " ".join(f"{row['test']['accuracy']:.4f}" for row in own)
        means = [_mean(own, key) for key in ("slots_used", "slots_kl")]
        lines.append(markdown_row([name, own[0]["parameters"], recall, *means]))
    return "\n".join(lines)


def _mean(rows: list[ResultRow], key: str) -> str:
    return f"{np.mean([row[key] for row in rows]):.3g}" if key in rows[0] else ""


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
