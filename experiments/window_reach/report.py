"""Figure and table of predicted reach and measured accuracy, from the rows."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.train_cell import ResultRow
from experiments.window_reach.sweep import WINDOWS, predicted_accuracy


def main(rows: list[ResultRow], folder: Path) -> None:
    lines = ["| window | predicted | measured (two seeds) | largest difference |", "|---|---|---|---|"]
    for window in WINDOWS:
        measured = [r["test"]["accuracy"] for r in rows if r["window"] == window]
        apart = max(abs(m - predicted_accuracy(window)) for m in measured)
        lines.append(
            f"| {window} | {predicted_accuracy(window):.3f} | {' '.join(f'{m:.3f}' for m in measured)} | {apart:.3f} |"
        )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    windows = np.arange(2, 65, 2)
    axes.plot(
        windows, [predicted_accuracy(int(w)) for w in windows], color="0.35", label="predicted from the generator"
    )
    axes.plot([r["window"] for r in rows], [r["test"]["accuracy"] for r in rows], "o", color="#0072b2", label="trained")
    axes.set(xlabel="window (tokens)", ylabel="test accuracy", ylim=(0, 1.02), title="MQAR, length 64, 8 pairs")
    axes.legend(frameon=False)
    figure.savefig(folder / "reach.svg")
