"""The table of accuracies by position, from the rows."""

from pathlib import Path

from experiments.state_tracking.sweep import CELLS, RATES
from experiments.train_cell import ResultRow, best_row


def main(rows: list[ResultRow], folder: Path) -> None:
    header = [
        "task and strength",
        *(f"valid at {rate:g}" for rate in RATES),
        "test, two seeds",
        "by position, two seeds",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in CELLS:
        grid = {r["lr"]: r["valid"]["accuracy"] for r in rows if r["stage"] == "grid" and r["mixer"] == name}
        rate = best_row(rows, "grid", mixer=name)["lr"]
        final = [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == rate]
        tests = " ".join(f"{r['test']['accuracy']:.3f}" for r in final)
        groups = [g for g in final[0]["test"] if g.startswith("group/")]
        parts = "; ".join(
            f"{g.removeprefix('group/t').replace('_', '-')}: " + " ".join(f"{r['test'][g]:.3f}" for r in final)
            for g in groups
        )
        cells = [name, *(f"{grid[rate]:.3f}" for rate in RATES), tests, parts]
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
