"""Tables of the rows: `python -m experiments.inner_mechanisms.report` rewrites table.md."""

from pathlib import Path

from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format one table per mechanism, with the entries of its rows as columns."""
    mechanisms = dict.fromkeys(row["mechanism"] for row in rows)
    return "\n\n".join(_mechanism_table([r for r in rows if r["mechanism"] == name]) for name in mechanisms)


def _mechanism_table(rows: list[ResultRow]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("mechanism", "commit")))
    lines = [markdown_row([_cell(row.get(name, "")) for name in columns]) for row in rows]
    return "\n".join([markdown_row([*columns]), "|---" * len(columns) + "|", *lines])


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {' '.join(map(str, entries))}" for name, entries in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
