"""Table and figure of the rows: `python -m experiments.overwrites.report` rewrites both."""

from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.overwrites.sweep import LENGTH, MIXERS, TASK, config
from experiments.results import best_row, markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent
COLOURS = dict(
    zip(
        MIXERS,
        ("#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#882255", "#117733", "0.5"),
        strict=True,
    )
)


def table(rows: list[ResultRow]) -> str:
    """Format valid accuracy by learning rate, and at the best one test accuracy of each seed and the memory's norms."""
    lengths = TASK.lengths("test")
    header = ["memory", "state bytes", "parameters", "valid by rate", *(f"test at {n}" for n in lengths), "norm held"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in MIXERS:
        grid = sorted((r for r in rows if r["stage"] == "grid" and r["mixer"] == name), key=lambda r: r["lr"])
        seeds = _rows_at_best_rate(rows, name)
        best = best_row(rows, "grid", mixer=name)["lr"]
        valid = ", ".join(
            f"{'**' * (r['lr'] == best)}{r['lr']:g}: {r['valid']['accuracy']:.2f}{'**' * (r['lr'] == best)}"
            for r in grid
        )
        test = [" ".join(f"{_accuracy_by_length(r)[n]:.2f}" for r in seeds) for n in lengths]
        norms = [r["norms"] for r in seeds if r.get("norms")]
        means = (
            ", ".join(f"{np.mean([by_length[n] for by_length in norms]):.3g} at {n}" for n in norms[0]) if norms else ""
        )
        lines.append(markdown_row([name, grid[0]["state_bytes"], grid[0]["parameters"], valid, *test, means]))
    return "\n".join(lines)


def _rows_at_best_rate(rows: list[ResultRow], name: str) -> list[ResultRow]:
    """Every seed at the best learning rate, starting with the seed of the grid."""
    best = best_row(rows, "grid", mixer=name)["lr"]
    return sorted((r for r in rows if r["mixer"] == name and r["lr"] == best), key=lambda r: r["seed"])


def _accuracy_by_length(row: ResultRow) -> dict[int, float]:
    """Test accuracy at each length: the mean over its groups, weighted by their numbers of queries."""
    accuracy = {}
    for length in TASK.lengths("test"):
        counts = {n: c for n, c in _query_counts(row["seed"]).items() if n.startswith(f"L{length}_") and c}
        correct = sum(row["test"][f"group/{name}"] * count for name, count in counts.items())
        accuracy[length] = correct / sum(counts.values())
    return accuracy


@cache
def _query_counts(seed: int) -> dict[str, float]:
    """Number of test queries of a run with this seed, by group."""
    evaluate, counts = config("full", 1e-3, seed).evaluate, np.zeros(len(TASK.groups))
    for index in range(evaluate.batches):
        batch = TASK.batch(seed, "test", index, evaluate.batch_size)
        np.add.at(counts, batch.group[batch.weights > 0], 1)
    return dict(zip(TASK.groups, counts, strict=True))


def draw_figure(rows: list[ResultRow], file: Path) -> None:
    """Draw test accuracy against length: mean and range over seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    lengths = TASK.lengths("test")
    for name, colour in COLOURS.items():
        accuracy = np.array([[_accuracy_by_length(r)[n] for n in lengths] for r in _rows_at_best_rate(rows, name)])
        style = "--" if name == "attention" else "-"
        axes.plot(lengths, accuracy.mean(axis=0), style, color=colour, marker="o", markersize=4, label=name)
        axes.vlines(lengths, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.4)
    axes.axhline(TASK.chance(), color="0.5", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel=f"tokens (trained on {LENGTH})", ylabel="test accuracy", ylim=(0, 1.05))
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_title("Last values of overwritten keys: mean and range of the seeds at the best rate on valid")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(file)


def main() -> None:
    """Write `table.md` and `overwrites.svg`."""
    rows = read_rows(FOLDER)
    write_table(table(rows), FOLDER)
    draw_figure(rows, FOLDER / "overwrites.svg")


if __name__ == "__main__":
    main()
