"""Accuracy against memory: which models does no other beat with as little state?"""

import math
from statistics import fmean
from typing import Any

from recallax.report.figures import GREY, MARKERS, Figure, colour, cycle_style, figure_text
from recallax.report.grouping import ModelGroup, Setting, group_by_model

MAX_NAMED_MODELS = 20
"""Models up to which all have their names at their points."""


def models_with_state_bytes(settings: list[Setting]) -> list[ModelGroup]:
    """The models that know how many bytes their state has."""
    return group_by_model([setting for setting in settings if (setting.state_bytes() or 0) > 0])


def pareto_front(settings: list[Setting]) -> list[Setting]:
    """Those whose mean accuracy no other reaches with at most as many bytes, by bytes."""
    found: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.state_bytes() or 0, -fmean(s.test_accuracies()))):
        if not found or fmean(setting.test_accuracies()) > fmean(found[-1].test_accuracies()):
            found.append(setting)
    return found


def pareto_caption(models: list[ModelGroup]) -> str:
    """What the figure shows, in words."""
    seeds = {len(model.best_setting().seeds()) for model in models}
    told = "Test accuracy against the bytes of state per sequence at the task's longest length."
    if max(seeds) > 1:
        counts = f"{max(seeds)} each" if len(seeds) == 1 else "as many as stand in brackets"
        told += f" Points are means over seeds, {counts}; bars go from the lowest seed to the highest."
    told += " The line joins the models that no other reaches with at most as much state."
    if any(len(model.settings) > 1 for model in models):
        told += " Of each model, the setting that is best on valid; its other settings are the small grey points."
    if len(models) > MAX_NAMED_MODELS:
        told += f" Only the models on the line are named, of {len(models)}."
    return told


def pareto_height(models: list[ModelGroup]) -> float:
    """Inches."""
    return 4.2 + 0.1 * max(0, min(len(models), MAX_NAMED_MODELS) - 8)


def draw_pareto(figure: Figure, models: list[ModelGroup]) -> None:
    ax = figure.subplots()
    chosen = [model.best_setting() for model in models]
    points = [_point(setting) for setting in chosen]
    low, high = min(size for size, _ in points) / 2, max(size for size, _ in points) * 2
    _setup_axes(ax, low, high)
    others = [_point(setting) for model in models for setting in model.settings if setting not in chosen]
    ax.plot(*zip(*others, strict=True) if others else ((), ()), ".", color="#bbb", zorder=1.5)
    front = pareto_front(chosen)
    if len(front) > 1:
        ax.step(*zip(*map(_point, front), strict=True), where="post", color="#bbb", zorder=1.2)
    chances = {run.info_number("chance") for setting in chosen for run in setting.runs}
    if len(chances) == 1 and (chance := chances.pop()) is not None:
        ax.axhline(chance, color=GREY, linestyle=(0, (1, 2)))
        ax.text(0.998, chance, "chance", transform=ax.get_yaxis_transform(), ha="right", va="bottom", color=GREY)
    several = len({len(setting.seeds()) for setting in chosen}) > 1
    named = [len(models) <= MAX_NAMED_MODELS or setting in front for setting in chosen]
    labels = [_point_label(model, several) if shown else "" for model, shown in zip(models, named, strict=True)]
    bars = [(min(setting.test_accuracies()), max(setting.test_accuracies())) for setting in chosen]
    across = [math.log(size / low) / math.log(high / low) for size, _ in points]
    places = [(x, y, *bar) for x, (_, y), bar in zip(across, points, bars, strict=True)]
    for i, (x, y, start) in enumerate(_place_labels(places, labels)):
        size, accuracy = points[i]
        ax.vlines(size, *bars[i], color=colour(i), linewidth=1.5)
        ax.plot(size, accuracy, cycle_style(MARKERS, i), color=colour(i), markersize=7)
        line = {"arrowstyle": "-", "color": "#999", "relpos": (0 if start else 1, 0.5), "shrinkB": 3, "shrinkA": 2}
        text, side = (low * (high / low) ** x, y), "left" if start else "right"
        beside = y == accuracy and abs(x - across[i]) < 0.02
        ax.annotate(labels[i], points[i], text, ha=side, va="center", arrowprops=None if beside else line)


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
    return setting.state_bytes() or 0.0, fmean(setting.test_accuracies())


def _point_label(model: ModelGroup, several: bool) -> str:
    return figure_text(model.label) + (f" ({len(model.best_setting().seeds())})" if several else "")


def _place_labels(
    places: list[tuple[float, float, float, float]], labels: list[str]
) -> list[tuple[float, float, bool]]:
    """Where each label stands, and whether it starts there (or ends), given the points and the ends of their bars.

    As near to its point as may be without covering a label, a point or a bar, on the right rather than on the left.
    Places are fractions of the axes; the size of a label is that of its letters, roughly.
    """
    height, letter, gap = 0.05, 0.0088, 0.013
    taken = [(x - gap / 2, x + gap / 2, min(low, y - 0.02), max(high, y + 0.02)) for x, y, low, high in places]
    moves = sorted((k * height / 2 for k in range(-44, 45)), key=abs)
    found: dict[int, tuple[float, float, bool]] = {}
    for i, (x, y, _, _) in sorted(enumerate(places), key=lambda item: item[1][:2]):
        width = letter * len(labels[i])
        aside = [gap * k for k in (1, 3, 6, 10, 15, 21, 28)]
        spots = [(x + side, y + move, True) for move in moves for side in aside]
        spots += [(x - side, y + move, False) for move in moves for side in aside]
        spots.sort(
            key=lambda spot: abs(spot[1] - y) + 2 * abs(spot[0] - x) + 0.03 * (not spot[2])
        )  # twice as wide as high

        def box(spot: tuple[float, float, bool], width: float = width) -> tuple[float, float, float, float]:
            left = spot[0] if spot[2] else spot[0] - width
            return left, left + width, spot[1] - 0.45 * height, spot[1] + 0.45 * height

        def free(spot: tuple[float, float, bool]) -> bool:
            left, right, low, high = box(spot)
            inside = left >= 0 and right <= 1 and low >= -0.01 and high <= 1.12
            return inside and not any(u < right and left < v and p < high and low < q for u, v, p, q in taken)

        found[i] = next(filter(free, spots), spots[0])
        if labels[i]:
            taken.append(box(found[i]))
    return [found[i] for i in range(len(places))]


def _format_bytes(size: float) -> str:
    power = max(0, min(int(math.log2(size) // 10), 4)) if size > 0 else 0
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
