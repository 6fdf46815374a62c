"""Tables and figure of the rows: `python -m experiments.recall_frontier.report` rewrites them."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.recall_frontier.sweep import LARGER_SIZE_MIXERS, MIXERS, RATES
from experiments.results import best_row, markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent
FAMILIES = {
    "based": ("#d55e00", "o"),
    "linear": ("#009e73", "s"),
    "window": ("#0072b2", "^"),
    "attention": ("0.2", "D"),
}


def table(rows: list[ResultRow]) -> str:
    """Format two tables: accuracy against bytes of state, and the best mixers at a larger size."""
    return f"{_frontier_table(rows)}\n\n{_larger_size_table(rows)}"


def _seeds_at_best_rate(rows: list[ResultRow], stage: str, name: str) -> list[ResultRow]:
    best = best_row(rows, "grid", mixer=name)["lr"]
    return [r for r in rows if r["stage"] == stage and r["mixer"] == name and r["lr"] == best]


def _frontier_table(rows: list[ResultRow]) -> str:
    first, *others = (f"{rate:g}" for rate in RATES)
    header = ["mixer", "state bytes", "best rate", f"valid at {first}", *others, "test, two seeds"]
    lines = [markdown_row(header), "|---" * (len(header)) + "|"]
    for name in MIXERS:
        best = best_row(rows, "grid", mixer=name)
        grid = {r["lr"]: r["valid"]["accuracy"] for r in rows if r["stage"] == "grid" and r["mixer"] == name}
        test = " ".join(f"{r['test']['accuracy']:.3f}" for r in _seeds_at_best_rate(rows, "seeds", name))
        valid = [f"{grid[rate]:.3f}" if rate in grid else "" for rate in RATES]
        lines.append(markdown_row([name, best["state_bytes"], f"{best['lr']:g}", *valid, test]))
    return "\n".join(lines)


def _larger_size_table(rows: list[ResultRow]) -> str:
    header = ["mixer, small setting", "state bytes", "rate", "test, two seeds", "seconds"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in LARGER_SIZE_MIXERS:
        seeds = _seeds_at_best_rate(rows, "small", name)
        test = " ".join(f"{r['test']['accuracy']:.4f}" for r in seeds)
        seconds = " ".join(f"{r['seconds']:.0f}" for r in seeds)
        lines.append(markdown_row([name, seeds[0]["state_bytes"], f"{seeds[0]['lr']:g}", test, seconds]))
    return "\n".join(lines)


def draw_figure(rows: list[ResultRow], file: Path) -> None:
    """Draw accuracy against bytes of state, and accuracy against the learning rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for family, (colour, marker) in FAMILIES.items():
        names = [name for name in MIXERS if name.split()[0] == family]
        points = {name: [r["test"]["accuracy"] for r in _seeds_at_best_rate(rows, "seeds", name)] for name in names}
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
    figure.savefig(file)


def main() -> None:
    """Write `table.md` and `frontier.svg`."""
    rows = read_rows(FOLDER)
    write_table(table(rows), FOLDER)
    draw_figure(rows, FOLDER / "frontier.svg")


if __name__ == "__main__":
    main()
