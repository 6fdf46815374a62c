"""`recallax report`: write an HTML page, a CSV table and a Markdown table about runs."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from recallax.cli.options import parse_options
from recallax.cli.outputs import OutputFile


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a self-contained HTML page about one or more runs, and a CSV and a Markdown table beside it."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs or of sweeps."""
    out: OutputFile = Path("report.html")
    """HTML file to write."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(ReportOptions, arguments, "report")
    from recallax.report import write_report

    write_report(options.runs, options.out)
    print(f"report: {options.out}")
    return 0
