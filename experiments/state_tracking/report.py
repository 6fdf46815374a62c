"""Table of the sweep: `python -m experiments.state_tracking.report` rewrites table.md."""

from pathlib import Path

from experiments.results import best_row, markdown_row, read_rows, write_table
from experiments.state_tracking.sweep import RATES, VARIANTS
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format valid accuracy by learning rate, and test accuracy of each seed in all and by position."""
    rates = [f"valid at {rate:g}" for rate in RATES]
    header = ["task and strength", *rates, "test, two seeds", "by position, two seeds"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in VARIANTS:
        grid = {r["lr"]: r["valid"]["accuracy"] for r in rows if r["stage"] == "grid" and r["mixer"] == name}
        best = best_row(rows, "grid", mixer=name)["lr"]
        seeds = [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == best]
        by_position = "; ".join(
            f"{group.removeprefix('group/t').replace('_', '-')}: " + " ".join(f"{r['test'][group]:.3f}" for r in seeds)
            for group in seeds[0]["test"]
            if group.startswith("group/")
        )
        test = " ".join(f"{r['test']['accuracy']:.3f}" for r in seeds)
        lines.append(markdown_row([name, *(f"{grid[rate]:.3f}" for rate in RATES), test, by_position]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
