"""Table of the rows: `python -m experiments.memory_and_attention.report` rewrites table.md."""

from pathlib import Path

from experiments.memory_and_attention.sweep import MLP_PATTERNS, PATTERNS, QUERY_VARIANTS, RATES
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format valid accuracy at each learning rate, and test accuracy of each seed at the best one."""
    header = ["mixer", "state bytes", "parameters", *(f"{rate:g}" for rate in RATES), "test, each seed"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in (*PATTERNS, *QUERY_VARIANTS, *(f"{name}, deep" for name in MLP_PATTERNS)):
        own = [row for row in rows if row["mixer"] + (", deep" if row["stage"] == "deep" else "") == name]
        if not own:
            continue
        grid = {row["lr"]: row["valid"]["accuracy"] for row in own if row["stage"] == "grid"}
        best = max(grid, key=grid.__getitem__) if grid else own[0]["lr"]
        test = " ".join(f"{row['test']['accuracy']:.3f}" for row in own if row["lr"] == best)
        valid = [f"{grid[rate]:.3f}" if rate in grid else "" for rate in RATES]
        lines.append(markdown_row([name, own[0]["state_bytes"], own[0]["parameters"], *valid, test]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
