"""The table of a grid of learning rates."""

from collections.abc import Iterable, Sequence

from experiments.train_cell import ResultRow


def lr_grid_table(rows: list[ResultRow], names: Iterable[str], learning_rates: Sequence[float]) -> str:
    """Accuracy on valid at each rate, and on test of both seeds at the best one; arms that have rows."""
    header = [
        "mixer",
        "state bytes",
        "parameters",
        *(f"{rate:g}" for rate in learning_rates),
        "test, each seed",
        "seconds",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name in names:
        own = [row for row in rows if row["mixer"] == name]
        if not own:
            continue
        grid = {row["lr"]: row["valid"]["accuracy"] for row in own if row["stage"] == "grid"}
        rate = max(grid, key=grid.__getitem__)
        tests = [f"{row['test']['accuracy']:.3f}" for row in own if row["lr"] == rate]
        cells = [name, own[0]["state_bytes"], own[0]["parameters"]]
        cells += [f"{grid[r]:.3f}" if r in grid else "" for r in learning_rates]
        seconds = min(row["seconds"] for row in own)
        lines.append("| " + " | ".join(map(str, [*cells, " ".join(tests), f"{seconds:.0f}"])) + " |")
    return "\n".join(lines)
