"""Table of the sweep: `python -m experiments.long_mamba.report` rewrites table.md."""

from pathlib import Path

from experiments.long_mamba.sweep import KEPT_FRACTIONS, LENGTH, LENGTH_FACTORS
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format test accuracy by length, without filters and at each kept fraction, for each seed."""
    header = ["task", "mixer", "filters", *(factor * LENGTH for factor in LENGTH_FACTORS)]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for task, mixer in sorted({(row["task"], row["mixer"]) for row in rows}):
        seeds = sorted((r for r in rows if (r["task"], r["mixer"]) == (task, mixer)), key=lambda r: r["seed"])
        for key in ("plain", *(f"{fraction:g}" for fraction in KEPT_FRACTIONS)):
            accuracy = [
                " ".join(f"{run['lengths'][str(factor)][key]:.3f}" for run in seeds) for factor in LENGTH_FACTORS
            ]
            lines.append(markdown_row([task, mixer, "none" if key == "plain" else f"keeping {key}", *accuracy]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
