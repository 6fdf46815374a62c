"""Result rows of a sweep, and the files that hold them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recallax.atomic_files import write_atomic
from recallax.config import Config, ConfigError, fingerprint
from recallax.external_file import JsonTypes, parse_json_row, read_json_lines, read_regular_file, short_repr
from recallax.sweep.trial import ResultRow, Trial
from recallax.tasks import SPLITS
from recallax.train.log import read_log, to_json_scalar

_LOG_KEYS = ("kind", "step", "fingerprint", "seconds", "split")
"""Keys of an "eval" row of a log that are not metrics."""
_RUN_INFO_KEYS = ("chance", "parameters", "state_bytes", "device", "cpus", "jax", "commit")
"""Keys that a result row copies from the "run" row of a log."""
ROW_COLUMNS = frozenset({"config", *SPLITS, "skipped", "seconds", *_RUN_INFO_KEYS})
"""Columns of a result row, which labels and extra metrics must not have."""
_REQUIRED: dict[str, JsonTypes] = {"config": str}
_MAX_ROW_BYTES = 2**26
"""Size of a row.json; those of the experiments have a few kilobytes."""


def read_results(out: Path) -> dict[str, ResultRow]:
    """Read the result rows of a sweep.

    Args:
        out: Folder of the sweep.

    Returns:
        Rows by the fingerprint of their config, in the order of `results.jsonl`. The rows of runs that ended after the
        sweep was killed come last.

    Raises:
        ConfigError: A line of `results.jsonl`, or a `row.json`, is not a row.
        OSError: A file cannot be read.
    """
    file = out / "results.jsonl"
    try:
        recorded = read_json_lines(file, _REQUIRED) if file.exists() else []
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finished = [read_row(path) for path in sorted(out.glob("*/row.json"))]
    rows = {row["config"]: row for row in recorded}
    return rows | {row["config"]: row for row in finished if row["config"] not in rows}


def read_row(path: Path) -> ResultRow:
    """Read the row of one run.

    Args:
        path: The `row.json` of the run.

    Raises:
        ConfigError: The file is not a row.
        OSError: The file cannot be read.
    """
    try:
        return parse_json_row(read_regular_file(path, _MAX_ROW_BYTES), _REQUIRED)
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a row: {error}; restore it, or remove it and the sweep evaluates the run again"
        ) from error


def encode_row(row: Mapping[str, Any]) -> str:
    """Encode a row as one line of standard JSON.

    Args:
        row: Numbers (0-d arrays too), texts, booleans and None by name, and lists and mappings of them.

    Returns:
        The JSON text without a line end. Numbers that JSON cannot express are the strings "nan", "inf" and "-inf".

    Raises:
        ConfigError: A value is something else.
    """
    try:
        return json.dumps(_to_json_value(row, ""), allow_nan=False)
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"a value of the row cannot be encoded: {error}") from error


def write_results(rows: Iterable[ResultRow], out: Path) -> None:
    """Replace the `results.jsonl` of a sweep.

    Args:
        rows: All rows.
        out: Folder of the sweep.
    """
    write_atomic(out / "results.jsonl", "".join(encode_row(row) + "\n" for row in rows))


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


def add_extra_metrics(row: ResultRow, extra: Any) -> ResultRow:
    """Return a row with the entries that `Trial.extra_metrics` returned.

    Args:
        row: The row from `result_row`.
        extra: The entries.

    Raises:
        ConfigError: They are no mapping, or have the name of a label or a column.
    """
    if not isinstance(extra, Mapping):
        raise ConfigError(f"extra_metrics returned {short_repr(extra)}; it must return a mapping from names to values")
    if shared := sorted(row.keys() & extra.keys()):
        raise ConfigError(f"extra_metrics returned {shared[0]!r}, which the row has already; rename the metric")
    return {**row, **extra}


def _to_json_value(value: Any, path: str) -> Any:
    """Convert a value of a row to plain JSON values; `path` names it in an error."""
    if isinstance(value, Mapping):
        return {str(key): _to_json_value(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    try:
        return to_json_scalar(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is {short_repr(value)}; a row holds numbers, texts, lists and mappings") from error
