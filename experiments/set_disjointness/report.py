"""Table of the sweep: `python -m experiments.set_disjointness.report` rewrites table.md."""

from pathlib import Path

from experiments.results import best_row, markdown_row, read_rows, write_table
from experiments.set_disjointness.sweep import MIXERS
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent
SHORT_FIRST, LONG_FIRST = "group/short_first_4_16", "group/long_first_4_16"


def table(rows: list[ResultRow]) -> str:
    """Format test accuracy by the order of the sets, and its gap, for each seed at the best learning rate."""
    header = ["model", "state bytes", "rate", "short first", "long first", "gap (short - long first)"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in MIXERS:
        best = best_row(rows, "grid", mixer=name)["lr"]
        seeds = [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == best]
        short, long = ([r["test"][key] for r in seeds] for key in (SHORT_FIRST, LONG_FIRST))
        gaps = " ".join(f"{a - b:+.3f}" for a, b in zip(short, long, strict=True))
        both = [" ".join(f"{x:.3f}" for x in accuracies) for accuracies in (short, long)]
        lines.append(markdown_row([name, seeds[0]["state_bytes"] or "none", f"{best:g}", *both, gaps]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
