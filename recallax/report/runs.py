"""What a report reads of a run."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recallax.train.log import LogRow, read_log
from recallax.train.progress import printable
from recallax.train.run_folder import read_config

type Curve = list[tuple[int, int | float]]
"""(step, value) pairs."""


class ReportError(ValueError):
    """There is nothing to report on."""


@dataclass(frozen=True)
class RunSummary:
    """What the report shows of one run; what the run has not reached yet is None or empty."""

    label: str
    config: dict[str, str]
    """The resolved config's leaves by path, as JSON text."""
    info: LogRow
    """The last "run" row: what the run is and where it ran."""
    step: int
    train_loss: Curve
    valid_accuracy: Curve
    test: LogRow | None
    """The last evaluation on the test split."""

    def group_accuracies(self) -> dict[str, float | None]:
        """Test accuracy by group."""
        found = {
            k.removeprefix("group/"): parse_number(v) for k, v in (self.test or {}).items() if k.startswith("group/")
        }
        return {printable(name): value for name, value in found.items()}

    def metrics(self) -> dict[str, float | None]:
        """What the task measures besides accuracy on the test split, by name."""
        found = {k.removeprefix("measure/"): v for k, v in (self.test or {}).items() if k.startswith("measure/")}
        return {printable(name): parse_number(value) for name, value in found.items()}

    def info_number(self, name: str) -> float | None:
        """A finite number of the "run" row."""
        return _finite_number(self.info.get(name))

    def test_accuracy(self) -> float | None:
        """On the whole test split, where it is finite."""
        return _finite_number((self.test or {}).get("accuracy"))


def find_run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs; a sweep's folder stands for all of its runs. Raises ReportError if there is none."""
    found: list[Path] = []
    for folder in map(Path, paths):
        sweep = (folder / "results.jsonl").exists() and not (folder / "config.json").exists()
        found += sorted(path.parent for path in folder.glob("*/config.json")) if sweep else [folder]
    if not found:
        raise ReportError("a report needs at least one run folder, or the folder of a sweep that has begun")
    return found


def read_run(folder: Path) -> RunSummary:
    """A run from its folder. Raises RunFolderError or LogError."""
    config = read_config(folder)
    rows = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    about = _last_row(row for row in rows if row["kind"] == "run") or {}
    evals = [row for row in rows if row["kind"] == "eval"]
    return RunSummary(
        label=printable(str(about.get("name") or folder.absolute().name)),
        config=dict(_leaves(config, "")),
        info=about,
        step=max((row["step"] for row in rows), default=0),
        train_loss=_curve((row for row in rows if row["kind"] == "train"), "loss"),
        valid_accuracy=_curve((row for row in evals if row.get("split") == "valid"), "accuracy"),
        test=_last_row(row for row in evals if row.get("split") == "test"),
    )


def with_unique_labels(runs: list[RunSummary]) -> list[RunSummary]:
    """The runs with different labels: those that share a name get their fingerprint, or else a number, behind it."""
    labels = [run.label for run in runs]
    prints = [printable(str(run.info.get("fingerprint") or "")) for run in runs]
    named = [f"{x} {y}" if labels.count(x) > 1 else x for x, y in zip(labels, prints, strict=True)]
    unique = [f"{x} #{i}" if named.count(x) > 1 else x for i, x in enumerate(named, 1)]
    return [replace(run, label=label) for run, label in zip(runs, unique, strict=True)]


def parse_number(value: Any) -> int | float | None:
    """The number in a row, which stands there as a string if JSON cannot hold it; None if it is no number."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _finite_number(value: Any) -> float | None:
    found = parse_number(value)
    return float(found) if found is not None and math.isfinite(found) else None


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    return [(printable(path), printable(json.dumps(value)))]


def _curve(rows: Iterable[LogRow], name: str) -> Curve:
    found = [(row["step"], parse_number(row.get(name))) for row in rows]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _last_row(rows: Iterable[LogRow]) -> LogRow | None:
    return next(reversed(list(rows)), None)
