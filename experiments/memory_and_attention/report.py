"""The table of every way of joining, from the rows."""

from pathlib import Path

from experiments.memory_and_attention.sweep import MLP_PATTERNS, PATTERNS, QUERY_VARIANTS, RATES
from experiments.train_cell import ResultRow


def main(rows: list[ResultRow], folder: Path) -> None:
    (folder / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


def table(rows: list[ResultRow]) -> str:
    """Accuracy on valid at each rate, and on test of both seeds at the best one."""
    header = ["mixer", "state bytes", "parameters", *(f"{rate:g}" for rate in RATES), "test, each seed"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in (*PATTERNS, *QUERY_VARIANTS, *(f"{name}, deep" for name in MLP_PATTERNS)):
        own = [row for row in rows if row["mixer"] + (", deep" if row["stage"] == "deep" else "") == name]
        if not own:
            continue
        grid = {row["lr"]: row["valid"]["accuracy"] for row in own if row["stage"] == "grid"}
        rate = max(grid, key=grid.__getitem__) if grid else own[0]["lr"]
        tests = [f"{row['test']['accuracy']:.3f}" for row in own if row["lr"] == rate]
        cells = [name, own[0]["state_bytes"], own[0]["parameters"]]
        cells += [f"{grid[r]:.3f}" if r in grid else "" for r in RATES]
        lines.append("| " + " | ".join(map(str, [*cells, " ".join(tests)])) + " |")
    return "\n".join(lines)
