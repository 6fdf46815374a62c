"""Result rows of a sweep, and the files that hold them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from recallax.config import Config, fingerprint
from recallax.files import write_atomic
from recallax.sweep.trial import ResultRow, Trial
from recallax.train.log import read_log

_LOG_KEYS = ("kind", "step", "fingerprint", "seconds", "split")
"""Keys of an "eval" row of a log that are not metrics."""
_RUN_INFO_KEYS = ("chance", "parameters", "state_bytes", "device", "cpus", "jax", "commit")
"""Keys that a result row copies from the "run" row of a log."""


def read_results(out: Path) -> dict[str, ResultRow]:
    """Read the result rows of a sweep.

    Args:
        out: Folder of the sweep.

    Returns:
        Rows by the fingerprint of their config, in the order of `results.jsonl`. The rows of runs that ended after the
        sweep was killed come last.
    """
    file = out / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    recorded = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have truncated the last line
    finished = [json.loads(path.read_text()) for path in sorted(out.glob("*/row.json"))]
    rows = {row["config"]: row for row in recorded}
    return rows | {row["config"]: row for row in finished if row["config"] not in rows}


def write_results(rows: Iterable[ResultRow], out: Path) -> None:
    """Replace the `results.jsonl` of a sweep.

    Args:
        rows: All rows.
        out: Folder of the sweep.
    """
    write_atomic(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def is_finished(config: Config, rows: Mapping[str, ResultRow]) -> bool:
    """Return True if a config has a row, also one that an earlier version of recallax recorded.

    Args:
        config: The config of a trial.
        rows: Rows by fingerprint.
    """
    if fingerprint(config) in rows:
        return True
    try:
        return fingerprint(config, schema=1) in rows
    except ValueError:  # a value that schema 1 has no name for, so no earlier version has trained this config
        return False


def result_row(trial: Trial, folder: Path) -> ResultRow:
    """Make the row of a finished run from its log.

    Args:
        trial: The trial.
        folder: Its run folder.

    Returns:
        The labels, the fingerprint of the config, the metrics of the last evaluation by split, the number of skipped
        steps, the training time in seconds, and facts about the run and the machine.
    """
    log = read_log(folder / "log.jsonl")
    run_info, last_step = next(row for row in log if row["kind"] == "run"), log[-1]["step"]
    evaluations = {row["split"]: row for row in log if row["kind"] == "eval" and row["step"] == last_step}
    metrics = {split: {k: v for k, v in row.items() if k not in _LOG_KEYS} for split, row in evaluations.items()}
    train_rows = [row for row in log if row["kind"] == "train"]
    return {
        **trial.labels,
        "config": fingerprint(trial.config),
        **metrics,
        "skipped": train_rows[-1].get("skipped", 0) if train_rows else 0,
        "seconds": round(log[-1]["seconds"], 1),
        **{name: run_info.get(name) for name in _RUN_INFO_KEYS},
    }
