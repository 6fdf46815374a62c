"""The faults that recallax survives, and a pytest plugin that counts the tests which inject them.

A test names its faults with a mark: `@pytest.mark.fault("R7")`, or `@pytest.mark.fault("R6", "R7", trials=12)` if it
injects 12 faults. `--fault-table FILE` writes a Markdown table with the faults tried and survived, and fails if a fault
has not been tried.
"""

from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

FAULTS = {
    "R1": "kill -9 at any time while a run trains",
    "R2": "kill -9 while a checkpoint is written or deleted",
    "R3": "SIGTERM or SIGINT, once or twice",
    "R4": "SIGTERM to one of two processes of a run",
    "R5": "kill -9 or a hang of one of two processes of a run",
    "R6": "truncated, emptied or deleted file of the newest checkpoint",
    "R7": "flipped bits in a checkpoint or in exported weights",
    "R8": "all checkpoints damaged or deleted",
    "R9": "full disk",
    "R10": "read-only or deleted folder of a run or of its checkpoints",
    "R11": "two jobs with one run folder, or the lock of a job that died",
    "R12": "NaN or infinity in the loss, a gradient or an update",
    "R13": "sudden rise of the loss",
    "R14": "hang while a run trains",
    "R15": "checkpoint restored on another number or arrangement of devices",
    "R16": "data on another number of processes",
    "R17": "changed config, code or data when a run is resumed",
    "R18": "another hash seed, time zone, locale or working folder",
    "R20": "out of memory",
    "R21": "crash of one run of a sweep",
    "R22": "kill or full disk while a row of a log or of results is written",
    "R23": "export that is killed or fails, and damaged exports",
    "R24": "clock that is set back",
    "S1": "pickled code in weights or arrays",
    "S2": "native code in a shared compilation cache",
    "S3": "names of runs, exports and shards that leave their folder",
    "S4": "symbolic links in folders that recallax writes",
    "S5": "config files with foreign classes, unknown keys or excessive size",
    "S6": "code in config strings",
    "S7": "code from a model repository",
    "S8": "commands without a network",
    "S9": "HTML in the texts of a report",
    "S10": "formulas in tables, and control characters on a terminal",
    "S11": "ports open to other machines",
    "S12": "shell commands made of user input",
    "S13": "secrets of the environment in logs and checkpoints",
    "S14": "hostile weight files",
    "S15": "predictable names of temporary files",
}
"""Faults by id. R: reliability; S: security. R19, determinism on GPUs, needs a GPU and is not in the table."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-table", type=Path, metavar="FILE", help="write the table of faults; fail if a fault has not been tried"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Attach the faults of a test to its reports, which pytest-xdist sends to the process that writes the table."""
    for mark in item.iter_markers("fault"):
        unknown = [fault for fault in mark.args if fault not in FAULTS]
        if unknown or not mark.args:
            raise pytest.UsageError(
                f"{item.nodeid} has the faults {mark.args}; tests/fault_table.py lists the known ones"
            )
        for fault in mark.args:
            item.user_properties.append((f"fault {fault}", mark.kwargs.get("trials", 1)))


class FaultCounter:
    """Counts faults tried and survived, from the reports of tests.

    Args:
        file: Markdown file to write.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tried: Counter[str] = Counter()
        self._survived: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (report.when == "call" and not report.skipped) or report.failed:
            for name, trials in report.user_properties:
                if name.startswith("fault "):
                    fault = name.removeprefix("fault ")
                    self._tried[fault] += int(str(trials))
                    self._survived[fault] += int(str(trials)) * report.passed

    def untried(self) -> list[str]:
        """Return the faults without a test."""
        return [fault for fault in FAULTS if not self._tried[fault]]

    def table(self) -> str:
        """Return the table as Markdown."""
        rows = [f"| {id} | {text} | {self._tried[id]} | {self._survived[id]} |\n" for id, text in FAULTS.items()]
        return "| id | fault | tried | survived |\n|---|---|---:|---:|\n" + "".join(rows)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None]:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(self.table())
        if self.untried() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        yield

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("faults")
        terminalreporter.write(self.table())
        if untried := self.untried():
            terminalreporter.write_line(f"faults without a test that ran: {', '.join(untried)}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    """Count faults in the process that writes the table, which is no worker of pytest-xdist."""
    file = config.getoption("--fault-table")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultCounter(file), "fault counter")
