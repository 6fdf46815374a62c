"""Heat maps of accuracy over pairs of config fields that a sweep varied."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from recallax.report.figures import Figure, figure_text
from recallax.report.grouping import Setting, best_setting, group_by_model

MAX_HEATMAPS = 6
"""Maximum number of heat maps on a page."""
MAX_COLUMNS = 12
"""Number of values of a field up to which it is preferred for the x axis."""


@dataclass(frozen=True)
class HeatmapAxis:
    """A config field that was swept, or the model as a whole."""

    name: str
    """Path of the field, or `model`."""
    tied_fields: tuple[str, ...]
    """Other fields that always change together with this one."""
    value_by_setting: Mapping[int, str]
    """Value of each setting, by the index of the setting. Settings without the field are missing."""

    def ticks(self) -> list[str]:
        """Return the values in natural order: texts, then numbers."""
        return sorted(set(self.value_by_setting.values()), key=_natural_sort_key)


@dataclass(frozen=True)
class Heatmap:
    """Settings by the values of two axes."""

    x_axis: HeatmapAxis
    y_axis: HeatmapAxis
    cells: Mapping[tuple[str, str], list[Setting]]
    """Settings by (x value, y value)."""

    def caption(self) -> str:
        """Return the caption of the figure."""
        text = f"Mean test accuracy by {self.y_axis.name} and {self.x_axis.name}."
        text += " The cell with the best valid accuracy is outlined."
        for axis in (self.y_axis, self.x_axis):
            if axis.tied_fields:
                text += f" {axis.name} varies together with {', '.join(axis.tied_fields)}."
        if any(len(setting.seeds()) > 1 for settings in self.cells.values() for setting in settings):
            text += " Small numbers are the lowest and the highest accuracy of several seeds."
        if max(map(len, self.cells.values())) > 1:
            text += " Where several settings share a cell, it shows the one with the best valid accuracy."
        return text


def find_heatmaps(settings: Sequence[Setting]) -> tuple[list[Heatmap], int]:
    """Find pairs of axes that vary independently.

    Each axis has at least two values, and more than half of the pairs of values were tried.

    Args:
        settings: The settings of a sweep.

    Returns:
        At most `MAX_HEATMAPS` heat maps, first those with one setting per cell, then those with the most cells; and the
        number of heat maps that are left out.
    """
    heatmaps = []
    for pair in combinations(_swept_axes(settings), 2):
        x_axis, y_axis = sorted(pair, key=_y_axis_priority)
        cells: dict[tuple[str, str], list[Setting]] = {}
        for i in x_axis.value_by_setting.keys() & y_axis.value_by_setting.keys():
            cells.setdefault((x_axis.value_by_setting[i], y_axis.value_by_setting[i]), []).append(settings[i])
        columns, rows = {x for x, _ in cells}, {y for _, y in cells}
        if min(len(columns), len(rows)) >= 2 and len(cells) > len(columns) * len(rows) / 2:
            heatmaps.append(Heatmap(x_axis, y_axis, cells))
    heatmaps.sort(key=lambda heatmap: (max(map(len, heatmap.cells.values())) > 1, -len(heatmap.cells)))
    return heatmaps[:MAX_HEATMAPS], len(heatmaps[MAX_HEATMAPS:])


def _swept_axes(settings: Sequence[Setting]) -> list[HeatmapAxis]:
    """Return an axis per group of fields that vary together, and one for the model if several of its fields vary."""
    paths = list(dict.fromkeys(path for setting in settings for path in setting.config))
    by_partition: dict[tuple[int | None, ...], list[tuple[str, dict[int, str]]]] = {}
    fields = [(p, {i: _tick_label(s.config[p]) for i, s in enumerate(settings) if p in s.config}) for p in paths]
    for name, values in [*fields, ("model", _model_labels(settings))]:
        order = list(dict.fromkeys(values.values()))
        if len(order) > 1:
            # Fields that split the settings into the same groups vary together.
            partition = tuple(order.index(values[i]) if i in values else None for i in range(len(settings)))
            by_partition.setdefault(partition, []).append((name, values))
    axes = []
    for (name, values), *others in by_partition.values():
        axes.append(HeatmapAxis(name, tuple(other for other, _ in others if other != "model"), values))
    return axes


def _model_labels(settings: Sequence[Setting]) -> dict[int, str]:
    """Return the label of each setting's model, by the index of the setting."""
    names = {id(setting): model.label for model in group_by_model(settings) for setting in model.settings}
    return {i: names[id(setting)] for i, setting in enumerate(settings)}


def _y_axis_priority(axis: HeatmapAxis) -> tuple[bool, bool, bool, str]:
    """Return a sort key. Of two axes, the smaller is the x axis: few values, then optimizer fields, then others."""
    return len(axis.ticks()) > MAX_COLUMNS, axis.name == "model", not axis.name.startswith("optim."), axis.name


def heatmap_height(heatmap: Heatmap) -> float:
    """Return the height of the figure in inches.

    Args:
        heatmap: The heat map.
    """
    return 1.0 + 0.42 * len(heatmap.y_axis.ticks())


def draw_heatmap(figure: Figure, heatmap: Heatmap) -> None:
    """Draw a heat map.

    Args:
        figure: An empty figure.
        heatmap: The heat map.
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    ax = figure.subplots()
    columns = [tick for tick in heatmap.x_axis.ticks() if any(tick == x for x, _ in heatmap.cells)]
    rows = [tick for tick in heatmap.y_axis.ticks() if any(tick == y for _, y in heatmap.cells)]
    shown = {cell: best_setting(settings) for cell, settings in heatmap.cells.items()}
    means = {cell: fmean(setting.test_accuracies()) for cell, setting in shown.items()}
    low, high = min(means.values()), max(means.values())
    colours = matplotlib.colormaps["viridis"]
    best = best_setting(list(shown.values()))
    for (x, y), setting in shown.items():
        column, row = columns.index(x), rows.index(y)
        fraction = (means[x, y] - low) / (high - low) if high > low else 0.5
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, facecolor=colours(fraction), edgecolor="white", linewidth=1))
        text_colour = "white" if fraction < 0.6 else "black"
        several = len(setting.seeds()) > 1
        ax.text(column, row - 0.12 * several, f"{means[x, y]:.3f}", ha="center", va="center", color=text_colour)
        if several:
            spread = f"{min(setting.test_accuracies()):.3f} to {max(setting.test_accuracies()):.3f}"
            ax.text(column, row + 0.24, spread, ha="center", va="center", color=text_colour, fontsize=6.5)
        if setting is best:
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5, zorder=3))
    ax.set_xticks(range(len(columns)), [figure_text(tick, 24) for tick in columns])
    ax.set_yticks(range(len(rows)), [figure_text(tick) for tick in rows])
    ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(rows) - 0.45, -0.55))
    ax.set_xlabel(figure_text(heatmap.x_axis.name, 80))
    # The name of the y axis is the title: beside few rows it would not fit.
    ax.set_title(figure_text(heatmap.y_axis.name, 80), loc="left", fontsize=9)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _tick_label(value: str) -> str:
    """Return a leaf of a config as an axis shows it: texts without quotes."""
    try:
        leaf = json.loads(value)
    except json.JSONDecodeError:
        return value
    return leaf if isinstance(leaf, str) else "none" if leaf is None else value


def _natural_sort_key(text: str) -> tuple[bool, list[tuple[bool, float, str]]]:
    """Return a sort key: numbers come after texts, and `based 8` before `based 16`."""
    parts = re.split(r"((?<![\w.])-?\d+(?:\.\d*)?(?:e-?\d+)?)", text)
    return not parts[0], [(i % 2 == 1, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]
