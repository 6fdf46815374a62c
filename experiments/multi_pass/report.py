"""Table of the sweep: `python -m experiments.multi_pass.report` rewrites table.md."""

from pathlib import Path

from experiments.multi_pass.sweep import MIXERS
from experiments.results import best_row, markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format test accuracy at the best learning rate, by number of pairs and for each seed."""
    header = ["model", "state bytes", "rate", "4 pairs", "8 pairs", "both, two seeds"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in MIXERS:
        best = best_row(rows, "grid", mixer=name)["lr"]
        seeds = [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == best]
        pairs = [f"{sum(r['test'][f'group/L32_K{k}'] for r in seeds) / len(seeds):.3f}" for k in (4, 8)]
        both = " ".join(f"{r['test']['accuracy']:.3f}" for r in seeds)
        lines.append(markdown_row([name, seeds[0]["state_bytes"], f"{best:g}", *pairs, both]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
