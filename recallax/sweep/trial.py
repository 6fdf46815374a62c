"""Trials, and the Python files that yield them."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recallax.config import ConfigError
from recallax.train.run_config import RunConfig

type ResultRow = dict[str, Any]
"""Result of a finished run: its labels, the fingerprint of its config, and its metrics."""
type SweepStage = Callable[[list[ResultRow]], list["Trial"]]
"""Function from the rows so far to trials."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    labels: Mapping[str, str | int | float]
    """Values that identify the trial in results and reports, such as its learning rate. They join its row."""
    config: RunConfig
    """The config to train."""
    extra_metrics: Callable[..., ResultRow] | None = None
    """Function of the `Program` and the trained `TrainState`; the entries that it returns join the row."""


def load_stages(file: Path) -> list[SweepStage]:
    """Execute a sweep file and return its stages.

    The working directory is added to `sys.path`, so that stages can import modules from it, also when they are called.

    Args:
        file: Python file with `STAGES`.

    Returns:
        The stages.

    Raises:
        ConfigError: There is no such file, or it has no list of functions `STAGES`.
    """
    if not file.is_file():
        raise ConfigError(f"there is no sweep at {file}; give a Python file that has STAGES")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stages = getattr(module, "STAGES", None)
    if not stages or not all(callable(stage) for stage in stages):
        raise ConfigError(f"{file} has no STAGES; it must be a list of functions from rows to trials")
    return list(stages)
