"""Figure of accuracy against state size, with the Pareto front."""

import math
from statistics import fmean
from typing import Any

from recallax.report.figures import GREY, MARKERS, Figure, colour, cycle_style, figure_text
from recallax.report.grouping import ModelGroup, Setting, group_by_model
from recallax.report.label_placement import PointMark, place_labels

MAX_NAMED_MODELS = 20
"""Number of models up to which every point has a label."""


def models_with_state_bytes(settings: list[Setting]) -> list[ModelGroup]:
    """Group the settings whose state size is known and not 0 by model.

    Args:
        settings: The settings.
    """
    return group_by_model([setting for setting in settings if (setting.state_bytes() or 0) > 0])


def pareto_front(settings: list[Setting]) -> list[Setting]:
    """Select the settings whose mean test accuracy no other reaches with the same or a smaller state.

    Args:
        settings: Settings with a known state size.

    Returns:
        The Pareto front, by ascending state size.
    """
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.state_bytes() or 0, -fmean(s.test_accuracies()))):
        if not front or fmean(setting.test_accuracies()) > fmean(front[-1].test_accuracies()):
            front.append(setting)
    return front


def pareto_caption(models: list[ModelGroup]) -> str:
    """Return the caption of the figure.

    Args:
        models: The models that it shows.
    """
    seeds = {len(model.best_setting().seeds()) for model in models}
    text = "Test accuracy against the state size per sequence, in bytes, at the task's longest length."
    if max(seeds) > 1:
        counts = f"{max(seeds)} each" if len(seeds) == 1 else "their number is in parentheses"
        text += f" Points are means over seeds ({counts}); bars go from the lowest seed to the highest."
    text += " The line is the Pareto front: no other model reaches its accuracy with the same or a smaller state."
    if any(len(model.settings) > 1 for model in models):
        text += " Each model is shown at its setting with the best valid accuracy;"
        text += " its other settings are the small grey points."
    if len(models) > MAX_NAMED_MODELS:
        text += f" Only the models on the line are labelled, out of {len(models)}."
    return text


def pareto_height(models: list[ModelGroup]) -> float:
    """Return the height of the figure in inches.

    Args:
        models: The models that it shows.
    """
    return 4.2 + 0.1 * max(0, min(len(models), MAX_NAMED_MODELS) - 8)


def draw_pareto(figure: Figure, models: list[ModelGroup]) -> None:
    """Draw test accuracy against state size.

    Args:
        figure: An empty figure.
        models: Models with a known state size.
    """
    ax = figure.subplots()
    best = [model.best_setting() for model in models]
    sizes = [size for size, _ in map(_point, best)]
    limits = min(sizes) / 2, max(sizes) * 2
    _setup_axes(ax, *limits)
    others = [_point(setting) for model in models for setting in model.settings if setting not in best]
    ax.plot(*zip(*others, strict=True) if others else ((), ()), ".", color="#bbb", zorder=1.5)
    front = pareto_front(best)
    if len(front) > 1:
        ax.step(*zip(*map(_point, front), strict=True), where="post", color="#bbb", zorder=1.2)
    chances = {run.info_number("chance") for setting in best for run in setting.runs}
    if len(chances) == 1 and (chance := chances.pop()) is not None:
        ax.axhline(chance, color=GREY, linestyle=(0, (1, 2)))
        ax.text(0.998, chance, "chance", transform=ax.get_yaxis_transform(), ha="right", va="bottom", color=GREY)
    _draw_points(ax, limits, models, best, front)


def _draw_points(
    ax: Any, limits: tuple[float, float], models: list[ModelGroup], best: list[Setting], front: list[Setting]
) -> None:
    """Draw each model's best setting, with a bar from its lowest to its highest seed, and a label."""
    low, high = limits
    show_seeds = len({len(setting.seeds()) for setting in best}) > 1
    labelled = [len(models) <= MAX_NAMED_MODELS or setting in front for setting in best]
    labels = [_point_label(model, show_seeds) if shown else "" for model, shown in zip(models, labelled, strict=True)]
    points = [_point(setting) for setting in best]
    bars = [(min(setting.test_accuracies()), max(setting.test_accuracies())) for setting in best]
    fractions = [math.log(size / low) / math.log(high / low) for size, _ in points]
    marks = [PointMark(x, y, *bar) for x, (_, y), bar in zip(fractions, points, bars, strict=True)]
    for i, position in enumerate(place_labels(marks, labels)):
        size, accuracy = points[i]
        ax.vlines(size, *bars[i], color=colour(i), linewidth=1.5)
        ax.plot(size, accuracy, cycle_style(MARKERS, i), color=colour(i), markersize=7)
        side = "left" if position.is_start else "right"
        is_adjacent = position.y == accuracy and abs(position.x - fractions[i]) < 0.02
        line = {"arrowstyle": "-", "color": "#999", "relpos": (0 if position.is_start else 1, 0.5)}
        line |= {"shrinkB": 3, "shrinkA": 2}
        text_point = low * (high / low) ** position.x, position.y
        ax.annotate(labels[i], points[i], text_point, ha=side, va="center", arrowprops=None if is_adjacent else line)


def _setup_axes(ax: Any, low: float, high: float) -> None:
    ax.set_xscale("log", base=2)
    ax.set(xlim=(low, high), ylim=(-0.02, 1.12), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set(xlabel="state (bytes per sequence, log scale)", ylabel="test accuracy (fraction)")
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    stride = math.ceil(len(powers) / 8)
    ticks = [2.0**power for power in powers if power % stride == 0]
    ax.set_xticks(ticks, [_format_bytes(size) for size in ticks])
    ax.minorticks_off()


def _point(setting: Setting) -> tuple[float, float]:
    """Return the state size in bytes and the mean test accuracy."""
    return setting.state_bytes() or 0.0, fmean(setting.test_accuracies())


def _point_label(model: ModelGroup, show_seeds: bool) -> str:
    return figure_text(model.label) + (f" ({len(model.best_setting().seeds())})" if show_seeds else "")


def _format_bytes(size: float) -> str:
    power = max(0, min(int(math.log2(size) // 10), 4)) if size > 0 else 0
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
