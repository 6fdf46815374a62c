"""The table, and accuracy against length, from the rows."""

from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.overwrites.sweep import LENGTH, MIXERS, TASK, config
from experiments.train_cell import ResultRow, best_row

COLOURS = dict(
    zip(
        MIXERS,
        ("#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#882255", "#117733", "0.5"),
        strict=True,
    )
)


def main(rows: list[ResultRow], folder: Path) -> None:
    (folder / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    _figure(rows, folder)


def rows_at_best_rate(rows: list[ResultRow], name: str) -> list[ResultRow]:
    """Every seed at the rate that was best on valid; the first is the one that the rate was chosen by."""
    rate = best_row(rows, "grid", mixer=name)["lr"]
    return sorted((r for r in rows if r["mixer"] == name and r["lr"] == rate), key=lambda r: r["seed"])


@cache
def query_counts(seed: int) -> dict[str, float]:
    """How many of the test queries of a run with this seed fall into each group."""
    evaluate, counts = config("full", 1e-3, seed).evaluate, np.zeros(len(TASK.groups))
    for index in range(evaluate.batches):
        batch = TASK.batch(seed, "test", index, evaluate.batch_size)
        np.add.at(counts, batch.group[batch.weights > 0], 1)
    return dict(zip(TASK.groups, counts, strict=True))


def accuracy_by_length(row: ResultRow) -> dict[int, float]:
    """Test accuracy at each length: its groups' mean."""
    found = {}
    for length in TASK.lengths("test"):
        part = {n: c for n, c in query_counts(row["seed"]).items() if n.startswith(f"L{length}_") and c}
        found[length] = sum(row["test"][f"group/{n}"] * c for n, c in part.items()) / sum(part.values())
    return found


def table(rows: list[ResultRow]) -> str:
    """One line per memory: bytes, parameters, valid accuracy at each rate, test accuracy of every seed, norms held."""
    lengths = TASK.lengths("test")
    header = ["memory", "state bytes", "parameters", "valid by rate", *(f"test at {n}" for n in lengths), "norm held"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in MIXERS:
        grid = sorted((r for r in rows if r["stage"] == "grid" and r["mixer"] == name), key=lambda r: r["lr"])
        last = rows_at_best_rate(rows, name)
        top = best_row(rows, "grid", mixer=name)["lr"]
        rates = ", ".join(
            f"{'**' * (r['lr'] == top)}{r['lr']:g}: {r['valid']['accuracy']:.2f}{'**' * (r['lr'] == top)}" for r in grid
        )
        held = [r["norms"] for r in last if r.get("norms")]
        norms = ", ".join(f"{np.mean([h[n] for h in held]):.3g} at {n}" for n in held[0]) if held else ""
        accuracies = [" ".join(f"{accuracy_by_length(r)[n]:.2f}" for r in last) for n in lengths]
        cells = [name, grid[0]["state_bytes"], grid[0]["parameters"], rates, *accuracies, norms]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _figure(rows: list[ResultRow], folder: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    lengths = TASK.lengths("test")
    for name, colour in COLOURS.items():
        found = np.array([[accuracy_by_length(r)[n] for n in lengths] for r in rows_at_best_rate(rows, name)])
        style = "--" if name == "attention" else "-"
        axes.plot(lengths, found.mean(axis=0), style, color=colour, marker="o", markersize=4, label=name)
        axes.vlines(lengths, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.4)
    axes.axhline(TASK.chance(), color="0.5", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel=f"tokens (trained on {LENGTH})", ylabel="test accuracy", ylim=(0, 1.05))
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_title("Last values of overwritten keys: mean and range of the seeds at the best rate on valid")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(folder / "overwrites.svg")
