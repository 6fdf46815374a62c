"""The Pareto of accuracy against state bytes over both sweeps on `mqar_micro`, and the table, from the rows."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.__main__ import read_rows
from experiments.recall_frontier.sweep import MIXERS as EARLIER
from experiments.recall_vs_state.sweep import MIXERS, RATES
from experiments.train_cell import ResultRow, best_row

FAMILIES = {
    "attention": ("0.2", "D"),
    "window": ("#0072b2", "^"),
    "linear": ("#009e73", "s"),
    "based": ("#d55e00", "o"),
    "gla": ("#56b4e9", "v"),
    "mamba2": ("#e69f00", "P"),
    "delta_net": ("#cc79a7", "X"),
    "gated_delta_net": ("#882255", "*"),
    "kda": ("#117733", "h"),
    "mom": ("#000000", "p"),
}


def main(rows: list[ResultRow], folder: Path) -> None:
    earlier = read_rows(folder.parent / "recall_frontier")
    rows = [*earlier, *rows]
    names = [*EARLIER, *MIXERS]
    (folder / "table.md").write_text(table(rows, names) + "\n")
    print(table(rows, names))
    _figure(rows, names, folder)


def rows_at_best_rate(rows: list[ResultRow], name: str) -> list[ResultRow]:
    """The two seeds at the rate that was best on valid."""
    rate = best_row(rows, "grid", mixer=name)["lr"]
    return [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == rate]


def table(rows: list[ResultRow], names: list[str]) -> str:
    """One line per mixer, by accuracy: bytes, parameters, rates, both test accuracies."""
    header = ["mixer", "state bytes", "parameters", "best rate", "valid at it, next best", "test, two seeds", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in sorted(names, key=lambda n: -np.mean([r["test"]["accuracy"] for r in rows_at_best_rate(rows, n)])):
        grid = [r for r in rows if r["stage"] == "grid" and r["mixer"] == name and r["lr"] in RATES]
        order = sorted((r["valid"]["accuracy"] for r in grid), reverse=True)
        seeds = rows_at_best_rate(rows, name)
        cells = (
            name,
            seeds[0]["state_bytes"],
            seeds[0]["parameters"],
            f"{seeds[0]['lr']:g}",
            f"{order[0]:.3f}, {order[1]:.3f}",
            " ".join(f"{r['test']['accuracy']:.3f}" for r in seeds),
            " ".join(f"{r['seconds']:.0f}" for r in seeds),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _figure(rows: list[ResultRow], names: list[str], folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for family, (colour, marker) in FAMILIES.items():
        label: str | None = family
        for name in (n for n in names if n.split()[0] == family):
            seeds = rows_at_best_rate(rows, name)
            values, size = [r["test"]["accuracy"] for r in seeds], seeds[0]["state_bytes"]
            axes.vlines(size, min(values), max(values), color=colour)
            axes.plot(size, np.mean(values), linestyle="none", marker=marker, color=colour, label=label)
            text = " ".join(name.split()[1:])
            axes.annotate(text, (size, np.mean(values)), textcoords="offset points", xytext=(5, -9), fontsize=7)
            label = None
    chance = rows[0]["chance"]
    axes.axhline(chance, color="0.5", linestyle=":", label=f"chance {chance:.3f}")
    axes.axhline(1.0, color="0.5", linestyle="--", label="oracle")
    axes.set(xscale="log", xlabel="bytes of state at 32 tokens", ylabel="test accuracy", ylim=(0, 1.05))
    ticks = (1000, 2000, 5000, 10_000, 20_000)
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_title("MQAR, 4 and 8 pairs in 32 tokens: best rate on valid, two other seeds")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(folder / "pareto.svg")
