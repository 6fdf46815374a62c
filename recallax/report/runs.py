"""Reading of runs for a report."""

import importlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recallax.config import diff_json
from recallax.external_file import printable
from recallax.train.checkpoint_description import newest_metadata
from recallax.train.log import LogRow, finite_number, parse_number, read_log
from recallax.train.run_folder import RunFolderError, read_config

type Curve = list[tuple[int, int | float]]
"""(step, value) pairs."""


class ReportError(ValueError):
    """There is no run to report on."""


@dataclass(frozen=True)
class RunSummary:
    """Data of one run that a report shows. Values that the run has not logged yet are None or empty."""

    label: str
    """Name of the run in tables and figures."""
    config: dict[str, str]
    """Leaves of the resolved config by path, as JSON text."""
    info: LogRow
    """The last "run" row of the log: facts about the config and the machine."""
    step: int
    """The last optimizer step in the log."""
    train_loss: Curve
    """Training loss in nats."""
    valid_accuracy: Curve
    """Accuracy on the valid split, a fraction."""
    test: LogRow | None
    """The last evaluation on the test split."""
    events: list[LogRow]
    """The "event" rows, oldest first: loss spikes, interruptions, stages, and the end of a run that is not finite."""

    def group_accuracies(self) -> dict[str, float | None]:
        """Return the accuracy on the test split by group."""
        return self._test_numbers("group/")

    def metrics(self) -> dict[str, float | None]:
        """Return the task's metrics besides accuracy, on the test split, by name."""
        return self._test_numbers("measure/")

    def info_number(self, name: str) -> float | None:
        """Return a number of the "run" row; None if it is missing or not finite.

        Args:
            name: Key of the row.
        """
        return finite_number(self.info.get(name))

    def test_accuracy(self) -> float | None:
        """Return the accuracy on the test split; None if it is missing or not finite."""
        return finite_number((self.test or {}).get("accuracy"))

    def _test_numbers(self, prefix: str) -> dict[str, float | None]:
        """Return the numbers of the test evaluation whose keys have a prefix, without the prefix."""
        test = self.test or {}
        return {printable(k.removeprefix(prefix)): parse_number(v) for k, v in test.items() if k.startswith(prefix)}


def find_run_folders(paths: Sequence[Path]) -> list[Path]:
    """Replace the folders of sweeps by the folders of their runs.

    Args:
        paths: Folders of runs or of sweeps.

    Returns:
        Folders of runs.

    Raises:
        ReportError: There is no run.
    """
    folders: list[Path] = []
    for folder in map(Path, paths):
        sweep = (folder / "results.jsonl").exists() and not (folder / "config.json").exists()
        folders += sorted(path.parent for path in folder.glob("*/config.json")) if sweep else [folder]
    if not folders:
        raise ReportError("a report needs at least one run folder, or the folder of a sweep that has run folders")
    return folders


def read_run(folder: Path) -> RunSummary:
    """Read a run.

    Args:
        folder: Folder of the run.

    Returns:
        The data of the run.

    Raises:
        RunFolderError: The folder is not a run's, or its newest checkpoint was written with another config.
        LogError: The log is damaged.
    """
    config = read_config(folder)
    _check_same_config(folder, config)
    rows = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    info = _last_row(row for row in rows if row["kind"] == "run") or {}
    evals = [row for row in rows if row["kind"] == "eval"]
    return RunSummary(
        label=printable(str(info.get("name") or folder.absolute().name)),
        config=dict(_leaves(config, "")),
        info=info,
        step=max((row["step"] for row in rows), default=0),
        train_loss=_curve((row for row in rows if row["kind"] == "train"), "loss"),
        valid_accuracy=_curve((row for row in evals if row.get("split") == "valid"), "accuracy"),
        test=_last_row(row for row in evals if row.get("split") == "test"),
        events=[row for row in rows if row["kind"] == "event"],
    )


def with_unique_labels(runs: list[RunSummary]) -> list[RunSummary]:
    """Make labels unique: equal ones get the fingerprint of their run, and if that is equal too, a number.

    Args:
        runs: The runs.

    Returns:
        The runs with unique labels.
    """
    labels = [run.label for run in runs]
    fingerprints = [printable(str(run.info.get("fingerprint") or "")) for run in runs]
    named = [f"{x} {y}" if labels.count(x) > 1 else x for x, y in zip(labels, fingerprints, strict=True)]
    unique = [f"{x} #{i}" if named.count(x) > 1 else x for i, x in enumerate(named, 1)]
    return [replace(run, label=label) for run, label in zip(runs, unique, strict=True)]


def _check_same_config(folder: Path, config: dict[str, Any]) -> None:
    recorded = newest_metadata(folder / "checkpoints").get("config", config)
    if recorded == config:
        return
    importlib.import_module("recallax.train.run_config")  # defines the classes that decode an earlier schema
    if differences := diff_json(recorded, config):
        raise RunFolderError(
            f"the newest checkpoint in {folder} was written with another config than its config.json (checkpoint -> "
            "config.json):\n  " + "\n  ".join(differences) + "\nrestore the config.json of the run"
        )


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    return [(printable(path), printable(json.dumps(value)))]


def _curve(rows: Iterable[LogRow], name: str) -> Curve:
    points = [(row["step"], parse_number(row.get(name))) for row in rows]
    return [(step, value) for step, value in points if value is not None and math.isfinite(value)]


def _last_row(rows: Iterable[LogRow]) -> LogRow | None:
    return next(reversed(list(rows)), None)
