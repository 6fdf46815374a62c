"""Measure every mechanism: `python -m experiments.inner_mechanisms.measure` rewrites results.jsonl and table.md."""

import json
import time
from pathlib import Path

from experiments.inner_mechanisms import decay, depth, learned_gates, momentum
from recallax.train.log import git_commit

FOLDER = Path(__file__).parent
MECHANISMS = (decay, momentum, learned_gates, depth)


def main() -> None:
    rows = []
    for part in MECHANISMS:
        begin = time.monotonic()
        found = part.measure()
        rows += [row | {"commit": git_commit()} for row in found]
        print(*found, f"{time.monotonic() - begin:.0f} s", sep="\n", flush=True)
    (FOLDER / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (FOLDER / "table.md").write_text(tables(rows) + "\n")


def tables(rows: list[dict]) -> str:
    """One table per mechanism; its columns are what its rows hold."""
    return "\n\n".join(
        table([r for r in rows if r["mechanism"] == name]) for name in dict.fromkeys(map(_mechanism, rows))
    )


def table(rows: list[dict]) -> str:
    names = [name for row in rows for name in row if name not in ("mechanism", "commit")]
    columns = list(dict.fromkeys(names))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(
        [*lines, *("| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |" for row in rows)]
    )


def _mechanism(row: dict) -> str:
    return row["mechanism"]


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {' '.join(map(str, entries))}" for name, entries in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
