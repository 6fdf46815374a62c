"""Tables of a report, and their rendering as HTML, CSV and Markdown."""

import csv
import html
import io
import re
from collections.abc import Callable, Iterable
from statistics import fmean

from recallax.external_file import printable
from recallax.report.grouping import Setting
from recallax.report.runs import RunSummary
from recallax.train.log import RESERVED_KEYS, parse_number

type TableCell = str | int | float | None
type Table = list[list[TableCell]]
"""Rows of cells. The first row is the header, the first column the label of a row."""

EVENT_KEYS = (*RESERVED_KEYS, "event")
"""Keys of an "event" row that are not details of the event."""
COMMIT_DIGITS = 10
"""Number of hex digits that tables show of a commit."""


def summary_table(runs: list[RunSummary]) -> Table:
    """Make the table of test results and facts about each run.

    Args:
        runs: The runs.
    """
    header: list[TableCell] = ["run", "status", "test accuracy", "test loss", "chance", "oracle", "state bytes"]
    header += ["parameters", "device", "fingerprint", "commit"]
    table = [header]
    for run in runs:
        test = run.test or {}
        numbers = [parse_number(test.get(name)) for name in ("accuracy", "loss")]
        numbers += [parse_number(run.info.get(name)) for name in ("chance", "oracle", "state_bytes", "parameters")]
        status = "finished" if run.test else f"at step {run.step}"
        device, fingerprint, commit = (
            printable(str(run.info.get(name) or "")) for name in ("device", "fingerprint", "commit")
        )
        commit = re.sub(
            r"^[0-9a-f]{40}", lambda match: match[0][:COMMIT_DIGITS], commit
        )  # a suffix such as -dirty stays
        table.append([run.label, status, *numbers, device, fingerprint, commit])
    return table


def events_table(runs: list[RunSummary]) -> Table:
    """Make the table of the events in the logs of runs, with a row per event.

    Args:
        runs: The runs.
    """
    table: Table = [["run", "step", "event", "details"]]
    for run in runs:
        for row in run.events:
            values = {name: parse_number(value) for name, value in row.items() if name not in EVENT_KEYS}
            texts = [f"{name} {row[name] if value is None else f'{value:.4g}'}" for name, value in values.items()]
            table.append([run.label, row["step"], *(printable(t) for t in (str(row.get("event")), ", ".join(texts)))])
    return table


def values_table(runs: list[RunSummary], values: Callable[[RunSummary], dict[str, float | None]]) -> Table:
    """Make a table with a row per run and a column per named value.

    Args:
        runs: The runs.
        values: Function that returns the values of a run by name.
    """
    names = list(dict.fromkeys(name for run in runs for name in values(run)))
    table: Table = [["run", *names]]
    return table + [[run.label, *(values(run).get(name) for name in names)] for run in runs]


def settings_table(settings: list[Setting]) -> Table:
    """Make the table of accuracies by setting, with their spread over seeds.

    Args:
        settings: The settings.
    """
    table: Table = [["setting", "state bytes", "seeds", "valid mean", "test mean", "test lowest", "test highest"]]
    for setting in settings:
        valid, test, size = setting.mean_valid_accuracy(), setting.test_accuracies(), setting.state_bytes()
        size = int(size) if size is not None else None
        numbers = [valid if valid >= 0 else None, fmean(test), min(test), max(test)]
        table.append([setting.label, size, len(setting.seeds()), *numbers])
    return table


def config_differences(runs: list[RunSummary]) -> Table:
    """Make the table of config fields that differ between runs, with a column per run.

    Args:
        runs: The runs.
    """
    paths = sorted({path for run in runs for path in run.config})
    table: Table = [["field", *(run.label for run in runs)]]
    for path in paths:
        values = [run.config.get(path, "(absent)") for run in runs]
        if len(set(values)) > 1:
            table.append([path, *values])
    return table


def as_html(table: Table) -> str:
    """Render a table as HTML.

    Args:
        table: The table.
    """

    def row(cells: list[TableCell], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(_format_cell(c), quote=True)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in table[1:])
    return f'<div class="wide"><table><thead>{row(table[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def as_csv(table: Table) -> str:
    """Render a table as CSV. Texts that a spreadsheet would execute as a formula get an apostrophe in front.

    Args:
        table: The table.
    """

    def cell(value: TableCell) -> TableCell:
        risky = isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")
        return f"'{value}" if risky else value

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([cell(value) for value in row] for row in table)
    return out.getvalue()


def as_markdown(table: Table) -> str:
    """Render a table as Markdown. Special characters of Markdown and of HTML, which Markdown allows, are escaped.

    Args:
        table: The table.
    """

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    def escape(cell: TableCell) -> str:
        return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", html.escape(_format_cell(cell), quote=True))

    header, *rows = [[escape(cell) for cell in row] for row in table]
    return line(header) + line(["---"] * len(header)) + "".join(map(line, rows))


def _format_cell(cell: TableCell) -> str:
    match cell:
        case None:
            return ""
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:.4g}"
    return cell
