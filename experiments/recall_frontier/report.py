"""The frontier of accuracy against state bytes, the learning-rate curves, and the tables, from the rows."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.recall_frontier.sweep import LARGER_SIZE_MIXERS, MIXERS, RATES
from experiments.train_cell import ResultRow, best_row

FAMILIES = {
    "based": ("#d55e00", "o"),
    "linear": ("#009e73", "s"),
    "window": ("#0072b2", "^"),
    "attention": ("0.2", "D"),
}


def main(rows: list[ResultRow], folder: Path) -> None:
    tables = [_frontier_table(rows), _larger_size_table(rows)]
    (folder / "table.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    _figure(rows, folder)


def _final(rows: list[ResultRow], stage: str, name: str) -> list[ResultRow]:
    rate = best_row(rows, "grid", mixer=name)["lr"]
    return [r for r in rows if r["stage"] == stage and r["mixer"] == name and r["lr"] == rate]


def _frontier_table(rows: list[ResultRow]) -> str:
    lines = [
        "| mixer | state bytes | best rate | valid, by rate "
        + " | ".join(f"{r:g}" for r in RATES)
        + " | test, two seeds |",
        "|---|---|---|" + "---|" * (len(RATES) + 1),
    ]
    lines[0] = lines[0].replace("valid, by rate ", "valid at ", 1)
    for name in MIXERS:
        chosen = best_row(rows, "grid", mixer=name)
        grid = {r["lr"]: r["valid"]["accuracy"] for r in rows if r["stage"] == "grid" and r["mixer"] == name}
        tests = " ".join(f"{r['test']['accuracy']:.3f}" for r in _final(rows, "seeds", name))
        cells = " | ".join(f"{grid[rate]:.3f}" if rate in grid else "" for rate in RATES)
        lines.append(f"| {name} | {chosen['state_bytes']} | {chosen['lr']:g} | {cells} | {tests} |")
    return "\n".join(lines)


def _larger_size_table(rows: list[ResultRow]) -> str:
    lines = ["| mixer, small setting | state bytes | rate | test, two seeds | seconds |", "|---|---|---|---|---|"]
    for name in LARGER_SIZE_MIXERS:
        final = _final(rows, "small", name)
        tests = " ".join(f"{r['test']['accuracy']:.4f}" for r in final)
        seconds = " ".join(f"{r['seconds']:.0f}" for r in final)
        lines.append(f"| {name} | {final[0]['state_bytes']} | {final[0]['lr']:g} | {tests} | {seconds} |")
    return "\n".join(lines)


def _figure(rows: list[ResultRow], folder: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for family, (colour, marker) in FAMILIES.items():
        names = [name for name in MIXERS if name.split()[0] == family]
        points = {name: [r["test"]["accuracy"] for r in _final(rows, "seeds", name)] for name in names}
        size = {name: best_row(rows, "grid", mixer=name)["state_bytes"] for name in names}
        for name, values in points.items():
            left.vlines(size[name], min(values), max(values), color=colour)
            left.annotate(name, (size[name], np.mean(values)), textcoords="offset points", xytext=(4, -12), fontsize=8)
        means = [np.mean(points[name]) for name in names]
        style = "none" if family == "linear" else "-"
        left.plot([size[n] for n in names], means, linestyle=style, marker=marker, color=colour, label=family)
        for name in names:
            grid = sorted(
                (r["lr"], r["valid"]["accuracy"]) for r in rows if r["stage"] == "grid" and r["mixer"] == name
            )
            right.plot(*zip(*grid, strict=True), marker=marker, markersize=3, color=colour, linewidth=1)
    chance = rows[0]["chance"]
    left.axhline(chance, color="0.5", linestyle=":", label=f"chance {chance:.3f}")
    left.axhline(1.0, color="0.5", linestyle="--", label="oracle")
    left.set(xscale="log", xlabel="bytes of state at 32 tokens", ylabel="test accuracy", ylim=(0, 1.05))
    ticks = (1000, 2000, 5000, 10_000, 20_000)
    left.set_xticks(ticks, [f"{t:,}" for t in ticks])
    left.minorticks_off()
    left.set_title("best rate on valid, two other seeds")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.set(
        xscale="log", xlabel="learning rate", ylabel="valid accuracy", ylim=(0, 1.05), title="one seed, every rate"
    )
    figure.savefig(folder / "frontier.svg")
