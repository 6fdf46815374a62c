"""Tables of a report, as HTML, CSV and Markdown."""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable
from statistics import fmean

from recallax.train.progress import printable
from recallax.train.report.runs import Run, number
from recallax.train.report.settings import Setting

type Cell = str | int | float | None
type Table = list[list[Cell]]


def summary(runs: list[Run]) -> Table:
    header: list[Cell] = ["run", "status", "test accuracy", "test loss", "chance", "oracle", "state bytes"]
    header += ["parameters", "device", "fingerprint", "commit"]
    table = [header]
    for run in runs:
        test = run.test or {}
        numbers = [number(test.get(name)) for name in ("accuracy", "loss")]
        numbers += [number(run.about.get(name)) for name in ("chance", "oracle", "state_bytes", "parameters")]
        status = "finished" if run.test else f"at step {run.step}"
        texts = [printable(str(run.about.get(name) or "")) for name in ("device", "fingerprint", "commit")]
        table.append([run.label, status, *numbers, *texts[:2], re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", texts[2])])
    return table


def by_name(runs: list[Run], values: Callable[[Run], dict[str, float | None]]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in values(run)))
    table: Table = [["run", *names]]
    return table + [[run.label, *(values(run).get(name) for name in names)] for run in runs]


def by_setting(settings: list[Setting]) -> Table:
    """The spread over seeds, of settings with several and with one."""
    table: Table = [["setting", "state bytes", "seeds", "valid mean", "test mean", "test lowest", "test highest"]]
    for setting in settings:
        valid, test, size = setting.valid(), setting.test(), setting.state_bytes()
        size = int(size) if size is not None else None
        numbers = [valid if valid >= 0 else None, fmean(test), min(test), max(test)]
        table.append([setting.label, size, len(setting.seeds()), *numbers])
    return table


def differences(runs: list[Run]) -> Table:
    """Rows of config paths whose values differ between the runs, one column per run."""
    paths = sorted({path for run in runs for path in run.config})
    table: Table = [["field", *(run.label for run in runs)]]
    for path in paths:
        values = [run.config.get(path, "(absent)") for run in runs]
        if len(set(values)) > 1:
            table.append([path, *values])
    return table


def as_html(table: Table) -> str:
    def row(cells: list[Cell], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(_shown(c), quote=True)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table[1:])
    return f'<div class="wide"><table><thead>{row(table[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def as_csv(table: Table) -> str:
    """A spreadsheet runs a text that starts like a formula, so such a text gets an apostrophe."""

    def cell(value: Cell) -> Cell:
        risky = isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")
        return f"'{value}" if risky else value

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([cell(value) for value in row] for row in table)
    return out.getvalue()


def as_markdown(table: Table) -> str:
    """Markdown passes HTML through, so both its own signs and HTML's are escaped."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    shown = [[re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", html.escape(_shown(c), quote=True)) for c in r] for r in table]
    return line(shown[0]) + line(["---"] * len(shown[0])) + "".join(line(row) for row in shown[1:])


def _shown(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.4g}"
    return cell
