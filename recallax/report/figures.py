"""Rendering of figures as inline SVG, and the figures about individual runs."""

import html
import io
import re
from collections.abc import Callable
from typing import Any

from recallax.report.runs import RunSummary
from recallax.report.tables import Table
from recallax.train.log import parse_number

type Figure = Any
"""matplotlib.figure.Figure. matplotlib is imported only when a figure is drawn."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which colour-blind readers can distinguish. After seven runs the line style changes too."""
LINE_STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
GREY = "#555"
MAX_MARKED_POINTS = 30
"""Number of points of a curve from which on its points have no markers."""


def render_svg(caption: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Draw a figure of 9 inches width as inline SVG.

    Args:
        caption: Caption of the figure, as plain text.
        height: Height in inches.
        draw: Function that draws on an empty figure.

    Returns:
        A `<figure>` element.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Without parse_math, a dollar sign in a name is not a formula. With a fixed hashsalt, equal data give equal files.
    style: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.hashsalt": "recallax",
        "svg.fonttype": "none",
        "font.size": 9,
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    style |= {"axes.axisbelow": True, "legend.frameon": False, "font.family": ["sans-serif"]}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])  # not needed inside HTML
    return f"<figure>{svg}<figcaption>{html.escape(caption, quote=True)}</figcaption></figure>"


def draw_curves(figure: Figure, runs: list[RunSummary]) -> None:
    """Draw training loss and valid accuracy by step.

    Args:
        figure: An empty figure.
        runs: The runs.
    """
    panels = (
        ("training loss (nats)", [run.train_loss for run in runs]),
        ("valid accuracy (fraction)", [run.valid_accuracy for run in runs]),
    )
    axes = figure.subplots(1, 2, sharex=True)
    for ax, (name, curves) in zip(axes, panels, strict=True):
        for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            marker = cycle_style(MARKERS, i) if max(map(len, curves)) < MAX_MARKED_POINTS else ""
            style = {"color": colour(i), "linestyle": cycle_style(LINE_STYLES, i), "marker": marker, "markersize": 3.5}
            ax.plot([step for step, _ in curve], [value for _, value in curve], label=figure_text(run.label), **style)
        if not any(curves):
            ax.text(0.5, 0.5, "nothing logged yet", transform=ax.transAxes, ha="center", color=GREY)
        ax.set(xlabel="optimizer step", ylabel=name)
    for chance in {parse_number(run.info.get("chance")) for run in runs}:
        if chance is not None:
            axes[1].axhline(chance, color=GREY, linestyle=(0, (1, 2)), label="chance")
    axes[1].set(xlim=(0, None), ylim=(-0.02, 1.02))
    handles, labels = axes[1].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # runs on one task have the same chance level
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4)


def draw_group_accuracies(figure: Figure, runs: list[RunSummary], groups: Table) -> None:
    """Draw bars of test accuracy by group.

    Args:
        figure: An empty figure.
        runs: The runs.
        groups: The `values_table` of their group accuracies.
    """
    ax = figure.subplots()
    names = [figure_text(str(name)) for name in groups[0][1:]]
    tested = [(i, run, row) for i, (run, row) in enumerate(zip(runs, groups[1:], strict=True)) if run.test]
    thickness = 0.8 / len(tested)
    for bar, (i, run, row) in enumerate(tested):
        positions = [j + (bar - (len(tested) - 1) / 2) * thickness for j in range(len(names))]
        values = [value if isinstance(value, int | float) else 0.0 for value in row[1:]]
        hatch = cycle_style(("", "///", "...", "xxx"), i)
        ax.barh(
            positions,
            values,
            thickness * 0.9,
            color=colour(i),
            hatch=hatch,
            edgecolor="w",
            label=figure_text(run.label),
        )
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xlabel="test accuracy (fraction)", ylabel="group")
    ax.grid(visible=False, axis="y")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=4)


def figure_text(text: str, max_length: int = 40) -> str:
    """Return a text that a figure can show: ASCII, and shortened if it is too long for a legend.

    Args:
        text: Any text.
        max_length: Maximum number of characters.
    """
    text = text.encode("ascii", "replace").decode()
    text = text if len(text) <= max_length else f"{text[: max_length - 3]}..."
    return f" {text}" if text.startswith("_") else text  # matplotlib omits labels with a leading _ from legends


def colour(index: int) -> str:
    """Return the colour of a run.

    Args:
        index: Index of the run.
    """
    return COLOURS[index % len(COLOURS)]


def cycle_style(styles: tuple[str, ...], index: int) -> str:
    """Return the style of a run. It changes each time that the colours repeat.

    Args:
        styles: The styles.
        index: Index of the run.
    """
    return styles[index // len(COLOURS) % len(styles)]
