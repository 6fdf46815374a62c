"""A page about some runs, from their `config.json` and `log.jsonl` and nothing else.

One HTML file that needs no network and runs no script, with a CSV and a Markdown table of the same numbers beside it.
Names, configs and errors come from anywhere, so every string is escaped for the format that it goes into.
"""

import csv
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recallax.train.log import Row, read_log
from recallax.train.progress import printable
from recallax.train.run_folder import read_config, write_atomic

type Cell = str | int | float | None
type Table = list[list[Cell]]
type Curve = list[tuple[int, int | float]]
"""(step, value) pairs."""
type Figure = Any
"""matplotlib's, which is imported only to draw one."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart; after seven runs the line style changes too."""
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto } figure { margin: 1rem 0 } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
figcaption, .note { color: #555 } summary { cursor: pointer }
"""


class ReportError(ValueError):
    """There is nothing to report on."""


@dataclass(frozen=True)
class Run:
    """What the report shows of one run; what the run has not reached yet is None or empty."""

    label: str
    config: dict[str, str]
    """The resolved config's leaves by path, as JSON text."""
    about: Row
    """The last "run" row: what the run is and where it ran."""
    step: int
    train_loss: Curve
    valid_accuracy: Curve
    test: Row | None
    """The last evaluation on the test split."""

    def groups(self) -> dict[str, float | None]:
        """Test accuracy by group."""
        found = {k.removeprefix("group/"): _number(v) for k, v in (self.test or {}).items() if k.startswith("group/")}
        return {printable(name): value for name, value in found.items()}

    def measures(self) -> dict[str, float | None]:
        """What the task measures besides accuracy on the test split, by name."""
        found = {k.removeprefix("measure/"): v for k, v in (self.test or {}).items() if k.startswith("measure/")}
        return {printable(name): _number(value) for name, value in found.items()}


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write `out` (HTML) and, with the same stem, `.csv` and `.md`, from the folders of one or more runs.

    A run that is not finished is shown as far as it got. Raises ReportError without runs, RunFolderError for a
    folder that is not a run's, LogError for a damaged log, OSError if a file cannot be written.
    """
    if not runs:
        raise ReportError("a report needs at least one run folder")
    read = _tell_apart([read_run(Path(folder)) for folder in runs])
    summary, groups = _summary(read), _by_name(read, Run.groups)
    write_atomic(out, _page(read, summary, groups))
    tables = zip(summary, groups, _by_name(read, Run.measures), strict=True)
    all_numbers = [a + b[1:] + c[1:] for a, b, c in tables]
    write_atomic(out.with_suffix(".csv"), _csv(all_numbers))
    write_atomic(out.with_suffix(".md"), _markdown(all_numbers))


def read_run(folder: Path) -> Run:
    """A run from its folder. Raises RunFolderError or LogError."""
    config = read_config(folder)
    rows = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    about = _last(row for row in rows if row["kind"] == "run") or {}
    evals = [row for row in rows if row["kind"] == "eval"]
    return Run(
        label=printable(str(about.get("name") or folder.absolute().name)),
        config=dict(_leaves(config, "")),
        about=about,
        step=max((row["step"] for row in rows), default=0),
        train_loss=_curve((row for row in rows if row["kind"] == "train"), "loss"),
        valid_accuracy=_curve((row for row in evals if row.get("split") == "valid"), "accuracy"),
        test=_last(row for row in evals if row.get("split") == "test"),
    )


def _tell_apart(runs: list[Run]) -> list[Run]:
    """The runs with different labels: those that share a name get their fingerprint, or else a number, behind it."""
    labels = [run.label for run in runs]
    prints = [printable(str(run.about.get("fingerprint") or "")) for run in runs]
    named = [f"{x} {y}" if labels.count(x) > 1 else x for x, y in zip(labels, prints, strict=True)]
    unique = [f"{x} #{i}" if named.count(x) > 1 else x for i, x in enumerate(named, 1)]
    return [replace(run, label=label) for run, label in zip(runs, unique, strict=True)]


def _summary(runs: list[Run]) -> Table:
    header: list[Cell] = ["run", "status", "test accuracy", "test loss", "chance", "oracle", "state bytes"]
    header += ["parameters", "device", "fingerprint", "commit"]
    table = [header]
    for run in runs:
        test = run.test or {}
        numbers = [_number(test.get(name)) for name in ("accuracy", "loss")]
        numbers += [_number(run.about.get(name)) for name in ("chance", "oracle", "state_bytes", "parameters")]
        status = "finished" if run.test else f"at step {run.step}"
        texts = [printable(str(run.about.get(name) or "")) for name in ("device", "fingerprint", "commit")]
        table.append([run.label, status, *numbers, *texts[:2], re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", texts[2])])
    return table


def _by_name(runs: list[Run], values: Callable[[Run], dict[str, float | None]]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in values(run)))
    table: Table = [["run", *names]]
    return table + [[run.label, *(values(run).get(name) for name in names)] for run in runs]


def _differences(runs: list[Run]) -> Table:
    """Rows of config paths whose values differ between the runs, one column per run."""
    paths = sorted({path for run in runs for path in run.config})
    table: Table = [["field", *(run.label for run in runs)]]
    for path in paths:
        values = [run.config.get(path, "(absent)") for run in runs]
        if len(set(values)) > 1:
            table.append([path, *values])
    return table


def _page(runs: list[Run], summary: Table, groups: Table) -> str:
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title, quote=True)}</h1>", _html_table(summary), "<h2>Curves</h2>"]
    parts.append(_figure("Loss and accuracy while training.", 3.4, lambda figure: _draw_curves(figure, runs)))
    parts.append("<h2>Accuracy by group</h2>")
    if len(groups[0]) > 1:
        height = 1.1 + 0.13 * (len(groups[0]) - 1) * (len(runs) + 1)
        parts.append(_figure("Test accuracy by group.", height, lambda figure: _draw_groups(figure, runs, groups)))
        parts.append(_html_table(groups))
    else:
        parts.append('<p class="note">No run has been evaluated on the test split yet.</p>')
    if len((measures := _by_name(runs, Run.measures))[0]) > 1:
        parts += ["<h2>Other measures</h2>", "<p>On the test split:</p>", _html_table(measures)]
    if sum(_place(run) is not None for run in runs) > 1:
        parts.append("<h2>Accuracy against memory</h2>")
        caption = "Test accuracy against the bytes of state per sequence at the task's longest length."
        parts.append(_figure(caption, 4.2, lambda figure: _draw_memory(figure, runs)))
    parts.append("<h2>Config</h2>")
    if len(runs) > 1:
        parts += ["<p>What differs between the runs:</p>", _html_table(_differences(runs))]
    for run in runs:
        leaves: Table = [["field", "value"], *([k, v] for k, v in sorted(run.config.items()))]
        parts.append(f"<details><summary>{html.escape(run.label, quote=True)}</summary>{_html_table(leaves)}</details>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title, quote=True)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    def row(cells: list[Cell], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(_shown(c), quote=True)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table[1:])
    return f'<div class="wide"><table><thead>{row(table[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def _csv(table: Table) -> str:
    """A spreadsheet runs a text that starts like a formula, so such a text gets an apostrophe."""

    def cell(value: Cell) -> Cell:
        risky = isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")
        return f"'{value}" if risky else value

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([cell(value) for value in row] for row in table)
    return out.getvalue()


def _markdown(table: Table) -> str:
    """Markdown passes HTML through, so both its own signs and HTML's are escaped."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    shown = [[re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", html.escape(_shown(c), quote=True)) for c in r] for r in table]
    return line(shown[0]) + line(["---"] * len(shown[0])) + "".join(line(row) for row in shown[1:])


def _figure(caption: str, height: float, draw: Callable[[Figure], None]) -> str:
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


def _draw_curves(figure: Figure, runs: list[Run]) -> None:
    panels = (
        ("training loss (nats)", [run.train_loss for run in runs]),
        ("valid accuracy (fraction)", [run.valid_accuracy for run in runs]),
    )
    axes = figure.subplots(1, 2, sharex=True)
    for ax, (name, curves) in zip(axes, panels, strict=True):
        for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            marker = _cycle(MARKERS, i) if max(map(len, curves)) < 30 else ""
            look = {"color": _colour(i), "linestyle": _cycle(LINES, i), "marker": marker, "markersize": 3.5}
            ax.plot([step for step, _ in curve], [value for _, value in curve], label=_plain(run.label), **look)
        if not any(curves):
            ax.text(0.5, 0.5, "nothing logged yet", transform=ax.transAxes, ha="center", color="#555")
        ax.set(xlabel="optimizer step", ylabel=name)
    for chance in {_number(run.about.get("chance")) for run in runs}:
        if chance is not None:
            axes[1].axhline(chance, color="#555", linestyle=(0, (1, 2)), label="chance")
    axes[1].set(xlim=(0, None), ylim=(-0.02, 1.02))
    handles, labels = axes[1].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # runs on one task share their chance
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=4)


def _draw_groups(figure: Figure, runs: list[Run], groups: Table) -> None:
    ax = figure.subplots()
    names = [_plain(str(name)) for name in groups[0][1:]]
    tested = [(i, run, row) for i, (run, row) in enumerate(zip(runs, groups[1:], strict=True)) if run.test]
    thickness = 0.8 / len(tested)
    for place, (i, run, row) in enumerate(tested):
        places = [j + (place - (len(tested) - 1) / 2) * thickness for j in range(len(names))]
        values = [value if isinstance(value, int | float) else 0.0 for value in row[1:]]
        hatch = _cycle(("", "///", "...", "xxx"), i)
        ax.barh(places, values, thickness * 0.9, color=_colour(i), hatch=hatch, edgecolor="w", label=_plain(run.label))
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xlabel="test accuracy (fraction)", ylabel="group")
    ax.grid(visible=False, axis="y")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=4)


def _draw_memory(figure: Figure, runs: list[Run]) -> None:
    ax = figure.subplots()
    points = {i: place for i, run in enumerate(runs) if (place := _place(run)) is not None}
    sizes = [size for size, _ in points.values()]
    low, high = min(sizes) / 2, max(sizes) * 4  # room for the last label
    ax.set_xscale("log", base=2)
    ax.set(xlim=(low, high), ylim=(-0.02, 1.12), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set(xlabel="state (bytes per sequence, log scale)", ylabel="test accuracy (fraction)")
    ax.xaxis.set_major_formatter(lambda size, _: _bytes(size))
    ax.minorticks_off()
    places = {i: (math.log(size / low) / math.log(high / low), accuracy) for i, (size, accuracy) in points.items()}
    for i, (x, y) in _beside(places, [_plain(run.label) for run in runs]).items():
        ax.plot(*points[i], _cycle(MARKERS, i), color=_colour(i), markersize=8)
        line = {"arrowstyle": "-", "color": "#999", "relpos": (0, 0.5)} if y != places[i][1] else None
        text = (low * (high / low) ** x, y)
        ax.annotate(_plain(runs[i].label), points[i], text, va="center", arrowprops=line)


def _beside(places: dict[int, tuple[float, float]], labels: list[str]) -> dict[int, tuple[float, float]]:
    """Where each label starts: right of its point, moved up or down until it covers no label and no point.

    Places are fractions of the axes; the size of a label is that of its letters, roughly.
    """
    height, letter, gap = 0.055, 0.0085, 0.015
    taken = [(x - gap / 2, y, gap) for x, y in places.values()]
    found = {}
    for i, (x, y) in sorted(places.items(), key=lambda item: item[1]):
        width = letter * len(labels[i])
        moves = [sign * k * height for k in range(1, 20) for sign in (1, -1)]
        for middle in (y + move for move in [0.0, *moves]):
            clash = any(abs(middle - v) < 0.9 * height and u < x + gap + width and x + gap < u + w for u, v, w in taken)
            if not clash and 0 <= middle <= 1.09:
                break
        found[i] = (x + gap, middle)
        taken.append((x + gap, middle, width))
    return found


def _place(run: Run) -> tuple[float, float] | None:
    """State bytes and test accuracy, if the run has both."""
    size, accuracy = _number(run.about.get("state_bytes")), _number((run.test or {}).get("accuracy"))
    return (float(size), float(accuracy)) if size is not None and size > 0 and accuracy is not None else None


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    return [(printable(path), printable(json.dumps(value)))]


def _curve(rows: Iterable[Row], name: str) -> Curve:
    found = [(row["step"], _number(row.get(name))) for row in rows]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _last(rows: Iterable[Row]) -> Row | None:
    return next(reversed(list(rows)), None)


def _number(value: Any) -> int | float | None:
    """The number in a row, which stands there as a string if JSON cannot hold it; None if it is no number."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _shown(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.4g}"
    return cell


def _plain(text: str) -> str:
    """Text for a figure: what the font has, and no longer than a legend can bear."""
    text = text.encode("ascii", "replace").decode()
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves labels with a leading _ out of legends


def _bytes(size: float) -> str:
    power = max(0, min(int(math.log2(size) // 10), 4)) if size > 0 else 0
    return f"{size / 1024**power:g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _cycle(looks: tuple[str, ...], index: int) -> str:
    """The look that changes once the colours have been used up."""
    return looks[index // len(COLOURS) % len(looks)]
