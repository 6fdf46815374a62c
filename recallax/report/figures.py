"""Figures of a report as inlined SVG, and those that are about single runs."""

import html
import io
import re
from collections.abc import Callable
from typing import Any

from recallax.report.runs import RunSummary, parse_number
from recallax.report.tables import Table

type Figure = Any
"""matplotlib's, which is imported only to draw one."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart; after seven runs the line style changes too."""
LINE_STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
GREY = "#555"


def render_svg(caption: str, height: float, draw: Callable[[Figure], None]) -> str:
    """The drawing as inlined SVG: 9 inches wide, `height` inches high."""
    import matplotlib
    from matplotlib.figure import Figure

    # parse_math: a dollar sign in a name is no formula. hashsalt: the same numbers give the same file.
    look: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.hashsalt": "recallax",
        "svg.fonttype": "none",
        "font.size": 9,
    }
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    look |= {"axes.axisbelow": True, "legend.frameon": False, "font.family": ["sans-serif"]}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])  # HTML knows SVG without them
    return f"<figure>{svg}<figcaption>{html.escape(caption, quote=True)}</figcaption></figure>"


def draw_curves(figure: Figure, runs: list[RunSummary]) -> None:
    panels = (
        ("training loss (nats)", [run.train_loss for run in runs]),
        ("valid accuracy (fraction)", [run.valid_accuracy for run in runs]),
    )
    axes = figure.subplots(1, 2, sharex=True)
    for ax, (name, curves) in zip(axes, panels, strict=True):
        for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            marker = cycle_style(MARKERS, i) if max(map(len, curves)) < 30 else ""
            look = {"color": colour(i), "linestyle": cycle_style(LINE_STYLES, i), "marker": marker, "markersize": 3.5}
            ax.plot([step for step, _ in curve], [value for _, value in curve], label=figure_text(run.label), **look)
        if not any(curves):
            ax.text(0.5, 0.5, "nothing logged yet", transform=ax.transAxes, ha="center", color=GREY)
        ax.set(xlabel="optimizer step", ylabel=name)
    for chance in {parse_number(run.info.get("chance")) for run in runs}:
        if chance is not None:
            axes[1].axhline(chance, color=GREY, linestyle=(0, (1, 2)), label="chance")
    axes[1].set(xlim=(0, None), ylim=(-0.02, 1.02))
    handles, labels = axes[1].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # runs on one task share their chance
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=4)


def draw_group_accuracies(figure: Figure, runs: list[RunSummary], groups: Table) -> None:
    ax = figure.subplots()
    names = [figure_text(str(name)) for name in groups[0][1:]]
    tested = [(i, run, row) for i, (run, row) in enumerate(zip(runs, groups[1:], strict=True)) if run.test]
    thickness = 0.8 / len(tested)
    for place, (i, run, row) in enumerate(tested):
        places = [j + (place - (len(tested) - 1) / 2) * thickness for j in range(len(names))]
        values = [value if isinstance(value, int | float) else 0.0 for value in row[1:]]
        hatch = cycle_style(("", "///", "...", "xxx"), i)
        ax.barh(
            places, values, thickness * 0.9, color=colour(i), hatch=hatch, edgecolor="w", label=figure_text(run.label)
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xlabel="test accuracy (fraction)", ylabel="group")
    ax.grid(visible=False, axis="y")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=4)


def figure_text(text: str, max_length: int = 40) -> str:
    """Text for a figure: what the font has, and no longer than a legend can bear."""
    text = text.encode("ascii", "replace").decode()
    text = text if len(text) <= max_length else f"{text[: max_length - 3]}..."
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves labels with a leading _ out of legends


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def cycle_style(styles: tuple[str, ...], index: int) -> str:
    """The look that changes once the colours have been used up."""
    return styles[index // len(COLOURS) % len(styles)]
