"""Table and figure of the rows: `python -m experiments.window_reach.report` rewrites both."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.results import markdown_row, read_rows, write_table
from experiments.window_reach.sweep import WINDOWS, predicted_accuracy
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format predicted and measured test accuracy by window, and their largest difference."""
    header = ["window", "predicted", "measured (two seeds)", "largest difference"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for window in WINDOWS:
        measured, predicted = [r["test"]["accuracy"] for r in rows if r["window"] == window], predicted_accuracy(window)
        difference = max(abs(accuracy - predicted) for accuracy in measured)
        accuracies = " ".join(f"{accuracy:.3f}" for accuracy in measured)
        lines.append(markdown_row([window, f"{predicted:.3f}", accuracies, f"{difference:.3f}"]))
    return "\n".join(lines)


def draw_figure(rows: list[ResultRow], file: Path) -> None:
    """Draw accuracy against the window: predicted as a line, measured as points."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    windows = np.arange(2, 65, 2)
    predicted = [predicted_accuracy(int(window)) for window in windows]
    axes.plot(windows, predicted, color="0.35", label="predicted from the generator")
    axes.plot([r["window"] for r in rows], [r["test"]["accuracy"] for r in rows], "o", color="#0072b2", label="trained")
    axes.set(xlabel="window (tokens)", ylabel="test accuracy", ylim=(0, 1.02), title="MQAR, length 64, 8 pairs")
    axes.legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    """Write `table.md` and `reach.svg`."""
    rows = read_rows(FOLDER)
    write_table(table(rows), FOLDER)
    draw_figure(rows, FOLDER / "reach.svg")


if __name__ == "__main__":
    main()
