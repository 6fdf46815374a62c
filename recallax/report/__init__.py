"""A page about some runs, from their `config.json` and `log.jsonl` and nothing else.

One HTML file that needs no network and runs no script, with a CSV and a Markdown table of the same numbers beside it.
Names, configs and errors come from anywhere, so every string is escaped for the format that it goes into.
"""

from recallax.report.page import write_report
from recallax.report.runs import ReportError

__all__ = ["ReportError", "write_report"]
