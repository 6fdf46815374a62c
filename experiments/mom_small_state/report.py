"""Table of the sweep: `python -m experiments.mom_small_state.report` rewrites table.md."""

from pathlib import Path

from experiments.mom_small_state.sweep import MIXERS, RATES, best_rate
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format valid accuracy of the grid's two seeds, and test accuracy of the two other seeds at the best rate."""
    header = ["mixer", "state bytes", "parameters", *(f"{rate:g}" for rate in RATES), "best", "test, two other seeds"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in MIXERS:
        own, best = [row for row in rows if row["mixer"] == name], best_rate(rows, name)
        valid = [_accuracies(own, "grid", "valid", rate) for rate in RATES]
        test = _accuracies(own, "seeds", "test", best)
        lines.append(markdown_row([name, own[0]["state_bytes"], own[0]["parameters"], *valid, f"{best:g}", test]))
    return "\n".join(lines)


def _accuracies(rows: list[ResultRow], stage: str, split: str, rate: float) -> str:
    by_seed = sorted((r["seed"], r[split]["accuracy"]) for r in rows if r["stage"] == stage and r["lr"] == rate)
    return " ".join(f"{accuracy:.3f}" for _, accuracy in by_seed)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
