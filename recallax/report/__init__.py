"""Reports about runs: an HTML page, a CSV table and a Markdown table, from `config.json` and `log.jsonl`.

The page is one file that needs no network and runs no script. Names and configs may come from untrusted runs, so every
string is escaped for the format that it is written to.
"""

from recallax.report.page import write_report
from recallax.report.runs import ReportError

__all__ = ["ReportError", "write_report"]
