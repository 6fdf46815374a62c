"""The Markdown table of a sweep with the stages `grid` and `seeds`."""

from collections.abc import Iterable, Sequence

from experiments.results import accuracy_or_nan, markdown_row, rank
from recallax.sweep import ResultRow


def lr_grid_table(rows: list[ResultRow], names: Iterable[str], learning_rates: Sequence[float]) -> str:
    """Format a line per mixer that has rows.

    Args:
        rows: Rows of the sweep.
        names: Names of the mixers, in the order of the lines.
        learning_rates: The grid.

    Returns:
        A Markdown table: accuracy on the valid split at each learning rate, accuracy on the test split of each seed at
        the best one, and the shortest wall time in seconds.
    """
    rates = [f"{rate:g}" for rate in learning_rates]
    header = ["mixer", "state bytes", "parameters", *rates, "test, each seed", "seconds"]
    lines = [markdown_row(header), "|---" * len(header) + "|"]
    for name in names:
        own = [row for row in rows if row["mixer"] == name]
        if not own:
            continue
        grid = {row["lr"]: accuracy_or_nan(row, "valid") for row in own if row["stage"] == "grid"}
        best = max(grid, key=lambda rate: rank(grid[rate]))
        valid = [f"{grid[rate]:.3f}" if rate in grid else "" for rate in learning_rates]
        test = " ".join(f"{accuracy_or_nan(row, 'test'):.3f}" for row in own if row["lr"] == best)
        seconds = f"{min(row['seconds'] for row in own):.0f}"
        lines.append(markdown_row([name, own[0]["state_bytes"], own[0]["parameters"], *valid, test, seconds]))
    return "\n".join(lines)
