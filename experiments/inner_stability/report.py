"""Table of the rows: `python -m experiments.inner_stability.report` rewrites table.md."""

from pathlib import Path

from experiments.inner_stability.measure import CHUNKS
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format one line per place of the gradient, cosine of the keys and momentum."""
    header = ["gradient at", "cosine of keys", "momentum", *(f"chunk {chunk}" for chunk in CHUNKS)]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for row in rows:
        largest = [f"{rate:g}" if rate else "< 0.01" for rate in row["largest"].values()]
        lines.append(markdown_row([row["gradient"], f"{row['cosine']:g}", f"{row['momentum']:g}", *largest]))
    return "\n".join(lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
