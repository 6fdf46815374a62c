"""Heat maps of what was swept, found in what differs between the runs' configs."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from recallax.train.report.figures import Figure, plain
from recallax.train.report.settings import Setting, best, models_of

MOST = 6
"""Heat maps on one page."""


@dataclass(frozen=True)
class Axis:
    """A field of the configs that was swept, or the model as a whole."""

    name: str
    also: tuple[str, ...]
    """Fields that change with it, and with nothing else."""
    values: Mapping[int, str]
    """What each setting has, by the setting's number; those without the field are not there."""

    def ticks(self) -> list[str]:
        """The values in order: texts, in which numbers count as such, then numbers by size."""
        return sorted(set(self.values.values()), key=_order)


@dataclass(frozen=True)
class Grid:
    """Two axes, and the settings at each pair of their values."""

    across: Axis
    down: Axis
    cells: Mapping[tuple[str, str], list[Setting]]

    def caption(self) -> str:
        """What the figure shows, in words."""
        told = f"Mean test accuracy by {self.down.name} and {self.across.name}; outlined is the best on valid."
        for axis in (self.down, self.across):
            if axis.also:
                told += f" With {axis.name} changes {', '.join(axis.also)}."
        if any(len(setting.seeds()) > 1 for found in self.cells.values() for setting in found):
            told += " Small numbers: the lowest and the highest of several seeds."
        if max(map(len, self.cells.values())) > 1:
            told += " Where several settings share a cell, it shows the one that is best on valid."
        return told


def grids_of(settings: Sequence[Setting]) -> tuple[list[Grid], int]:
    """The heat maps to draw, and how many more there would be.

    Of each two axes that vary independently: more than half of the pairs of their values were tried, and at least two
    of each. First those with one setting to a cell, then those with most cells.
    """
    found = []
    for first, second in combinations(_axes(settings), 2):
        across, down = sorted((first, second), key=_goes_down)
        cells: dict[tuple[str, str], list[Setting]] = {}
        for i in across.values.keys() & down.values.keys():
            cells.setdefault((across.values[i], down.values[i]), []).append(settings[i])
        columns, rows = ({pair[i] for pair in cells} for i in (0, 1))
        if min(len(columns), len(rows)) >= 2 and len(cells) > len(columns) * len(rows) / 2:
            found.append(Grid(across, down, cells))
    found.sort(key=lambda grid: (max(map(len, grid.cells.values())) > 1, -len(grid.cells)))
    return found[:MOST], len(found[MOST:])


def _axes(settings: Sequence[Setting]) -> list[Axis]:
    """Fields that differ, one for all that differ alike, and the model where more than one of its fields does."""
    paths = list(dict.fromkeys(path for setting in settings for path in setting.config))
    alike: dict[tuple[int | None, ...], list[tuple[str, dict[int, str]]]] = {}
    swept = [(p, {i: _text(s.config[p]) for i, s in enumerate(settings) if p in s.config}) for p in paths]
    for name, values in [*swept, ("model", _models(settings))]:
        order = list(dict.fromkeys(values.values()))
        if len(order) > 1:
            partition = tuple(order.index(values[i]) if i in values else None for i in range(len(settings)))
            alike.setdefault(partition, []).append((name, values))
    axes = []
    for (name, values), *others in alike.values():
        axes.append(Axis(name, tuple(other for other, _ in others if other != "model"), values))
    return axes


def _models(settings: Sequence[Setting]) -> dict[int, str]:
    """The model of each setting, by name."""
    names = {id(setting): model.label for model in models_of(settings) for setting in model.settings}
    return {i: names[id(setting)] for i, setting in enumerate(settings)}


def _goes_down(axis: Axis) -> tuple[bool, bool, bool, str]:
    """The smaller of two goes across: few values, then what an optimizer takes, then what a model is made of."""
    return len(axis.ticks()) > 12, axis.name == "model", not axis.name.startswith("optim."), axis.name


def height(grid: Grid) -> float:
    """Inches."""
    return 1.0 + 0.42 * len(grid.down.ticks())


def draw_grid(figure: Figure, grid: Grid) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    ax = figure.subplots()
    columns = [tick for tick in grid.across.ticks() if any(tick == x for x, _ in grid.cells)]
    rows = [tick for tick in grid.down.ticks() if any(tick == y for _, y in grid.cells)]
    shown = {place: best(found) for place, found in grid.cells.items()}
    means = {place: fmean(setting.test()) for place, setting in shown.items()}
    low, high = min(means.values()), max(means.values())
    colours = matplotlib.colormaps["viridis"]
    winner = best(list(shown.values()))
    for (x, y), setting in shown.items():
        column, row = columns.index(x), rows.index(y)
        share = (means[x, y] - low) / (high - low) if high > low else 0.5
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, facecolor=colours(share), edgecolor="white", linewidth=1))
        ink = "white" if share < 0.6 else "black"
        several = len(setting.seeds()) > 1
        ax.text(column, row - 0.12 * several, f"{means[x, y]:.3f}", ha="center", va="center", color=ink)
        if several:
            spread = f"{min(setting.test()):.3f} to {max(setting.test()):.3f}"
            ax.text(column, row + 0.24, spread, ha="center", va="center", color=ink, fontsize=6.5)
        if setting is winner:
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5, zorder=3))
    ax.set_xticks(range(len(columns)), [plain(tick, 24) for tick in columns])
    ax.set_yticks(range(len(rows)), [plain(tick) for tick in rows])
    ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(rows) - 0.45, -0.55))
    ax.set_xlabel(plain(grid.across.name, 80))
    ax.set_title(plain(grid.down.name, 80), loc="left", fontsize=9)  # along the side it would not fit few rows
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _text(value: str) -> str:
    """A leaf as it reads on an axis: texts without their quotes."""
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    return found if isinstance(found, str) else "none" if found is None else value


def _order(text: str) -> tuple[bool, list[tuple[bool, float, str]]]:
    """Numbers after texts; within texts, `based 8` before `based 16`."""
    parts = re.split(r"((?<![\w.])-?\d+(?:\.\d*)?(?:e-?\d+)?)", text)
    return not parts[0], [(i % 2 == 1, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]
