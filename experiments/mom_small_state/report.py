"""The table of both mixers at every rate, from the rows."""

from pathlib import Path

from experiments.mom_small_state.sweep import MIXERS, RATES, best_rate
from experiments.train_cell import ResultRow


def main(rows: list[ResultRow], folder: Path) -> None:
    (folder / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


def table(rows: list[ResultRow]) -> str:
    """Accuracy on valid of the grid's two seeds at each rate, and on test of the two others at the best."""
    header = ["mixer", "state bytes", "parameters", *(f"{rate:g}" for rate in RATES), "best", "test, two other seeds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in MIXERS:
        own, rate = [row for row in rows if row["mixer"] == name], best_rate(rows, name)
        cells = [name, own[0]["state_bytes"], own[0]["parameters"]]
        cells += [_values(own, "grid", "valid", r) for r in RATES]
        cells += [f"{rate:g}", _values(own, "seeds", "test", rate)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _values(rows: list[ResultRow], stage: str, split: str, rate: float) -> str:
    found = sorted((r["seed"], r[split]["accuracy"]) for r in rows if r["stage"] == stage and r["lr"] == rate)
    return " ".join(f"{accuracy:.3f}" for _, accuracy in found)
