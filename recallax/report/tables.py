"""Tables of a report, as HTML, CSV and Markdown."""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable
from statistics import fmean

from recallax.report.grouping import Setting
from recallax.report.runs import RunSummary, parse_number
from recallax.train.progress import printable

type TableCell = str | int | float | None
type Table = list[list[TableCell]]


def summary_table(runs: list[RunSummary]) -> Table:
    header: list[TableCell] = ["run", "status", "test accuracy", "test loss", "chance", "oracle", "state bytes"]
    header += ["parameters", "device", "fingerprint", "commit"]
    table = [header]
    for run in runs:
        test = run.test or {}
        numbers = [parse_number(test.get(name)) for name in ("accuracy", "loss")]
        numbers += [parse_number(run.info.get(name)) for name in ("chance", "oracle", "state_bytes", "parameters")]
        status = "finished" if run.test else f"at step {run.step}"
        texts = [printable(str(run.info.get(name) or "")) for name in ("device", "fingerprint", "commit")]
        table.append([run.label, status, *numbers, *texts[:2], re.sub(r"^([0-9a-f]{10})[0-9a-f]{30}", r"\1", texts[2])])
    return table


def values_table(runs: list[RunSummary], values: Callable[[RunSummary], dict[str, float | None]]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in values(run)))
    table: Table = [["run", *names]]
    return table + [[run.label, *(values(run).get(name) for name in names)] for run in runs]


def settings_table(settings: list[Setting]) -> Table:
    """The spread over seeds, of settings with several and with one."""
    table: Table = [["setting", "state bytes", "seeds", "valid mean", "test mean", "test lowest", "test highest"]]
    for setting in settings:
        valid, test, size = setting.mean_valid_accuracy(), setting.test_accuracies(), setting.state_bytes()
        size = int(size) if size is not None else None
        numbers = [valid if valid >= 0 else None, fmean(test), min(test), max(test)]
        table.append([setting.label, size, len(setting.seeds()), *numbers])
    return table


def config_differences(runs: list[RunSummary]) -> Table:
    """Rows of config paths whose values differ between the runs, one column per run."""
    paths = sorted({path for run in runs for path in run.config})
    table: Table = [["field", *(run.label for run in runs)]]
    for path in paths:
        values = [run.config.get(path, "(absent)") for run in runs]
        if len(set(values)) > 1:
            table.append([path, *values])
    return table


def as_html(table: Table) -> str:
    def row(cells: list[TableCell], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(_format_cell(c), quote=True)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table[1:])
    return f'<div class="wide"><table><thead>{row(table[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def as_csv(table: Table) -> str:
    """A spreadsheet runs a text that starts like a formula, so such a text gets an apostrophe."""

    def cell(value: TableCell) -> TableCell:
        risky = isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")
        return f"'{value}" if risky else value

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([cell(value) for value in row] for row in table)
    return out.getvalue()


def as_markdown(table: Table) -> str:
    """Markdown passes HTML through, so both its own signs and HTML's are escaped."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    shown = [
        [re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", html.escape(_format_cell(c), quote=True)) for c in r] for r in table
    ]
    return line(shown[0]) + line(["---"] * len(shown[0])) + "".join(line(row) for row in shown[1:])


def _format_cell(cell: TableCell) -> str:
    match cell:
        case None:
            return ""
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.4g}"
    return cell
