"""Accuracy against memory: which models does no other beat with as little state?"""

import math
from statistics import fmean

from recallax.train.report.figures import GREY, MARKERS, Figure, colour, cycle, plain
from recallax.train.report.settings import Setting, best_of_models

NAMED = 20
"""Models up to which all have their names at their points."""


def placed(settings: list[Setting]) -> list[Setting]:
    """Those that know how many bytes their state has."""
    return [setting for setting in settings if (setting.state_bytes() or 0) > 0]


def frontier(settings: list[Setting]) -> list[Setting]:
    """Those whose mean accuracy no other reaches with at most as many bytes, by bytes."""
    found: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.state_bytes() or 0, -fmean(s.test()))):
        if not found or fmean(setting.test()) > fmean(found[-1].test()):
            found.append(setting)
    return found


def caption(settings: list[Setting]) -> str:
    """What the figure shows, in words."""
    chosen = best_of_models(settings)
    told = "Test accuracy against the bytes of state per sequence at the task's longest length."
    if any(len(setting.seeds()) > 1 for setting in chosen):
        told += " Points are means over seeds, bars go from the lowest seed to the highest."
    told += " The line joins the models that no other reaches with at most as much state."
    if len(chosen) < len(settings):
        told += " Of each model, the setting that is best on valid; its other settings are the small grey points."
    if len(chosen) > NAMED:
        told += f" Only the models on the line are named, of {len(chosen)}."
    return told


def draw_memory(figure: Figure, settings: list[Setting]) -> None:
    ax = figure.subplots()
    chosen = best_of_models(settings)
    points = [(setting.state_bytes() or 0.0, fmean(setting.test())) for setting in chosen]
    sizes = [size for size, _ in points]
    low, high = min(sizes) / 2, max(sizes) * 2
    ax.set_xscale("log", base=2)
    ax.set(xlim=(low, high), ylim=(-0.02, 1.12), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set(xlabel="state (bytes per sequence, log scale)", ylabel="test accuracy (fraction)")
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    stride = math.ceil(len(powers) / 8)
    ticks = [2.0**power for power in powers if power % stride == 0]
    ax.set_xticks(ticks, [_bytes(size) for size in ticks])
    ax.minorticks_off()
    others = [setting for setting in settings if setting not in chosen]
    ax.plot(
        [setting.state_bytes() for setting in others],
        [fmean(setting.test()) for setting in others],
        linestyle="none",
        marker=".",
        color="#bbb",
        zorder=1.5,
    )
    front = frontier(chosen)
    if len(front) > 1:
        steps = [points[chosen.index(setting)] for setting in front]
        ax.step(*zip(*steps, strict=True), where="post", color="#bbb", zorder=1.2)
    chances = {run.told("chance") for setting in settings for run in setting.runs}
    if len(chances) == 1 and (chance := chances.pop()) is not None:
        ax.axhline(chance, color=GREY, linestyle=(0, (1, 2)))
        ax.text(
            1, chance, "chance", transform=ax.get_yaxis_transform(), ha="right", va="bottom", color=GREY, fontsize=8
        )
    labels = [_label(setting) if len(chosen) <= NAMED or setting in front else "" for setting in chosen]
    places = [(math.log(size / low) / math.log(high / low), accuracy) for size, accuracy in points]
    for i, (setting, (x, y, start)) in enumerate(zip(chosen, _beside(places, labels), strict=True)):
        size, accuracy = points[i]
        ax.vlines(size, min(setting.test()), max(setting.test()), color=colour(i), linewidth=1.5)
        ax.plot(size, accuracy, cycle(MARKERS, i), color=colour(i), markersize=7)
        line = {"arrowstyle": "-", "color": "#999", "relpos": (0 if start else 1, 0.5)} if y != accuracy else None
        text = (low * (high / low) ** x, y)
        ax.annotate(labels[i], (size, accuracy), text, ha="left" if start else "right", va="center", arrowprops=line)


def _label(setting: Setting) -> str:
    seeds = len(setting.seeds())
    return plain(setting.label) + (f" ({seeds} seeds)" if seeds > 1 else "")


def _beside(places: list[tuple[float, float]], labels: list[str]) -> list[tuple[float, float, bool]]:
    """Where each label stands, and whether it starts there (or ends).

    Right of its point, or left where the axes end; moved up or down until it covers no label and no point. Places are
    fractions of the axes; the size of a label is that of its letters, roughly.
    """
    height, letter, gap = 0.055, 0.0085, 0.015
    taken = [(x - gap / 2, y, gap) for x, y in places]
    found: dict[int, tuple[float, float, bool]] = {}
    for i, (x, y) in sorted(enumerate(places), key=lambda item: item[1][::-1]):
        width = letter * len(labels[i])
        start = x + gap + width <= 1
        left = x + gap if start else x - gap - width
        moves = [sign * k * height for k in range(1, 20) for sign in (1, -1)]
        for middle in (y + move for move in [0.0, *moves]):
            clash = any(abs(middle - v) < 0.9 * height and u < left + width and left < u + w for u, v, w in taken)
            if not clash and 0 <= middle <= 1.09:
                break
        found[i] = (x + gap if start else x - gap, middle, start)
        if labels[i]:
            taken.append((left, middle, width))
    return [found[i] for i in range(len(places))]


def _bytes(size: float) -> str:
    power = max(0, min(int(math.log2(size) // 10), 4)) if size > 0 else 0
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
