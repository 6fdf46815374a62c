"""Table and figure of the rows: `python -m experiments.recall_vs_state.report` rewrites both.

They show the rows of `experiments/recall_frontier` too, which has the same task, learning rates and steps.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.recall_frontier.sweep import MIXERS as FRONTIER_MIXERS
from experiments.recall_vs_state.sweep import MIXERS, RATES
from experiments.results import best_row, markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent
NAMES = [*FRONTIER_MIXERS, *MIXERS]
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


def table(rows: list[ResultRow]) -> str:
    """Format one line per mixer of both sweeps, by falling test accuracy."""
    rows = _with_frontier_rows(rows)
    header = ["mixer", "state bytes", "parameters", "best rate", "valid at it, next best", "test, two seeds", "seconds"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in sorted(NAMES, key=lambda n: -np.mean([r["test"]["accuracy"] for r in _seeds_at_best_rate(rows, n)])):
        grid = [r for r in rows if r["stage"] == "grid" and r["mixer"] == name and r["lr"] in RATES]
        best, second, *_ = sorted((r["valid"]["accuracy"] for r in grid), reverse=True)
        seeds = _seeds_at_best_rate(rows, name)
        sizes = [seeds[0]["state_bytes"], seeds[0]["parameters"], f"{seeds[0]['lr']:g}"]
        test = " ".join(f"{r['test']['accuracy']:.3f}" for r in seeds)
        seconds = " ".join(f"{r['seconds']:.0f}" for r in seeds)
        lines.append(markdown_row([name, *sizes, f"{best:.3f}, {second:.3f}", test, seconds]))
    return "\n".join(lines)


def _with_frontier_rows(rows: list[ResultRow]) -> list[ResultRow]:
    return [*read_rows(FOLDER.parent / "recall_frontier"), *rows]


def _seeds_at_best_rate(rows: list[ResultRow], name: str) -> list[ResultRow]:
    best = best_row(rows, "grid", mixer=name)["lr"]
    return [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == best]


def draw_figure(rows: list[ResultRow], file: Path) -> None:
    """Draw accuracy against bytes of state."""
    rows = _with_frontier_rows(rows)
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for family, (colour, marker) in FAMILIES.items():
        label: str | None = family
        for name in (n for n in NAMES if n.split()[0] == family):
            seeds = _seeds_at_best_rate(rows, name)
            accuracies, size = [r["test"]["accuracy"] for r in seeds], seeds[0]["state_bytes"]
            axes.vlines(size, min(accuracies), max(accuracies), color=colour)
            axes.plot(size, np.mean(accuracies), linestyle="none", marker=marker, color=colour, label=label)
            text = " ".join(name.split()[1:])
            axes.annotate(text, (size, np.mean(accuracies)), textcoords="offset points", xytext=(5, -9), fontsize=7)
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
    figure.savefig(file)


def main() -> None:
    """Write `table.md` and `pareto.svg`."""
    rows = read_rows(FOLDER)
    write_table(table(rows), FOLDER)
    draw_figure(rows, FOLDER / "pareto.svg")


if __name__ == "__main__":
    main()
