"""Heat maps of what was swept, found in what differs between the runs' configs."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from recallax.report.figures import Figure, figure_text
from recallax.report.grouping import Setting, best_setting, group_by_model

MAX_HEATMAPS = 6
"""Heat maps on one page."""


@dataclass(frozen=True)
class HeatmapAxis:
    """A field of the configs that was swept, or the model as a whole."""

    name: str
    tied_fields: tuple[str, ...]
    """Fields that change with it, and with nothing else."""
    value_by_setting: Mapping[int, str]
    """What each setting has, by the setting's number; those without the field are not there."""

    def ticks(self) -> list[str]:
        """The values in order: texts, in which numbers count as such, then numbers by size."""
        return sorted(set(self.value_by_setting.values()), key=_natural_sort_key)


@dataclass(frozen=True)
class Heatmap:
    """Two axes, and the settings at each pair of their values."""

    x_axis: HeatmapAxis
    y_axis: HeatmapAxis
    cells: Mapping[tuple[str, str], list[Setting]]

    def caption(self) -> str:
        """What the figure shows, in words."""
        told = f"Mean test accuracy by {self.y_axis.name} and {self.x_axis.name}; outlined is the best on valid."
        for axis in (self.y_axis, self.x_axis):
            if axis.tied_fields:
                told += f" With {axis.name} changes {', '.join(axis.tied_fields)}."
        if any(len(setting.seeds()) > 1 for found in self.cells.values() for setting in found):
            told += " Small numbers: the lowest and the highest of several seeds."
        if max(map(len, self.cells.values())) > 1:
            told += " Where several settings share a cell, it shows the one that is best on valid."
        return told


def find_heatmaps(settings: Sequence[Setting]) -> tuple[list[Heatmap], int]:
    """The heat maps to draw, and how many more there would be.

    Of each two axes that vary independently: more than half of the pairs of their values were tried, and at least two
    of each. First those with one setting to a cell, then those with most cells.
    """
    found = []
    for first, second in combinations(_swept_axes(settings), 2):
        across, down = sorted((first, second), key=_y_axis_priority)
        cells: dict[tuple[str, str], list[Setting]] = {}
        for i in across.value_by_setting.keys() & down.value_by_setting.keys():
            cells.setdefault((across.value_by_setting[i], down.value_by_setting[i]), []).append(settings[i])
        columns, rows = ({pair[i] for pair in cells} for i in (0, 1))
        if min(len(columns), len(rows)) >= 2 and len(cells) > len(columns) * len(rows) / 2:
            found.append(Heatmap(across, down, cells))
    found.sort(key=lambda grid: (max(map(len, grid.cells.values())) > 1, -len(grid.cells)))
    return found[:MAX_HEATMAPS], len(found[MAX_HEATMAPS:])


def _swept_axes(settings: Sequence[Setting]) -> list[HeatmapAxis]:
    """Fields that differ, one for all that differ alike, and the model where more than one of its fields does."""
    paths = list(dict.fromkeys(path for setting in settings for path in setting.config))
    alike: dict[tuple[int | None, ...], list[tuple[str, dict[int, str]]]] = {}
    swept = [(p, {i: _tick_label(s.config[p]) for i, s in enumerate(settings) if p in s.config}) for p in paths]
    for name, values in [*swept, ("model", _model_labels(settings))]:
        order = list(dict.fromkeys(values.values()))
        if len(order) > 1:
            partition = tuple(order.index(values[i]) if i in values else None for i in range(len(settings)))
            alike.setdefault(partition, []).append((name, values))
    axes = []
    for (name, values), *others in alike.values():
        axes.append(HeatmapAxis(name, tuple(other for other, _ in others if other != "model"), values))
    return axes


def _model_labels(settings: Sequence[Setting]) -> dict[int, str]:
    """The model of each setting, by name."""
    names = {id(setting): model.label for model in group_by_model(settings) for setting in model.settings}
    return {i: names[id(setting)] for i, setting in enumerate(settings)}


def _y_axis_priority(axis: HeatmapAxis) -> tuple[bool, bool, bool, str]:
    """The smaller of two goes across: few values, then what an optimizer takes, then what a model is made of."""
    return len(axis.ticks()) > 12, axis.name == "model", not axis.name.startswith("optim."), axis.name


def heatmap_height(heatmap: Heatmap) -> float:
    """Inches."""
    return 1.0 + 0.42 * len(heatmap.y_axis.ticks())


def draw_heatmap(figure: Figure, heatmap: Heatmap) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    ax = figure.subplots()
    columns = [tick for tick in heatmap.x_axis.ticks() if any(tick == x for x, _ in heatmap.cells)]
    rows = [tick for tick in heatmap.y_axis.ticks() if any(tick == y for _, y in heatmap.cells)]
    shown = {place: best_setting(found) for place, found in heatmap.cells.items()}
    means = {place: fmean(setting.test_accuracies()) for place, setting in shown.items()}
    low, high = min(means.values()), max(means.values())
    colours = matplotlib.colormaps["viridis"]
    winner = best_setting(list(shown.values()))
    for (x, y), setting in shown.items():
        column, row = columns.index(x), rows.index(y)
        share = (means[x, y] - low) / (high - low) if high > low else 0.5
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, facecolor=colours(share), edgecolor="white", linewidth=1))
        ink = "white" if share < 0.6 else "black"
        several = len(setting.seeds()) > 1
        ax.text(column, row - 0.12 * several, f"{means[x, y]:.3f}", ha="center", va="center", color=ink)
        if several:
            spread = f"{min(setting.test_accuracies()):.3f} to {max(setting.test_accuracies()):.3f}"
            ax.text(column, row + 0.24, spread, ha="center", va="center", color=ink, fontsize=6.5)
        if setting is winner:
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5, zorder=3))
    ax.set_xticks(range(len(columns)), [figure_text(tick, 24) for tick in columns])
    ax.set_yticks(range(len(rows)), [figure_text(tick) for tick in rows])
    ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(rows) - 0.45, -0.55))
    ax.set_xlabel(figure_text(heatmap.x_axis.name, 80))
    ax.set_title(
        figure_text(heatmap.y_axis.name, 80), loc="left", fontsize=9
    )  # along the side it would not fit few rows
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _tick_label(value: str) -> str:
    """A leaf as it reads on an axis: texts without their quotes."""
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    return found if isinstance(found, str) else "none" if found is None else value


def _natural_sort_key(text: str) -> tuple[bool, list[tuple[bool, float, str]]]:
    """Numbers after texts; within texts, `based 8` before `based 16`."""
    parts = re.split(r"((?<![\w.])-?\d+(?:\.\d*)?(?:e-?\d+)?)", text)
    return not parts[0], [(i % 2 == 1, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]
