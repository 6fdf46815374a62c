"""Sweep files: Python files whose `STAGES` yield the trials of a sweep.

Errors in a sweep file become a `ConfigError` that names the file and the line.
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from recallax.config import ConfigError
from recallax.sweep.results import ROW_COLUMNS, encode_row
from recallax.sweep.trial import ResultRow, SweepStage, Trial
from recallax.train.run_config import RunConfig


def load_stages(file: Path) -> list[SweepStage]:
    """Execute a sweep file and return its stages.

    The working directory is added to `sys.path`, so that stages can import modules from it, also when they are called.

    Args:
        file: Python file with `STAGES`.

    Returns:
        The stages. A stage that raises an exception or returns something else than trials raises a ConfigError.

    Raises:
        ConfigError: There is no such file, it cannot be executed, or it has no list of functions `STAGES`.
    """
    if not file.is_file():
        raise ConfigError(f"there is no sweep at {file}; give a Python file that has STAGES")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with _errors_with_line(file):
        module = _execute(file)
    stages = getattr(module, "STAGES", None)
    if not isinstance(stages, list | tuple) or not stages or not all(callable(stage) for stage in stages):
        raise ConfigError(f"{file} has no STAGES; it must be a list of functions from rows to trials")
    return [partial(_call_stage, file, stage) for stage in stages]


def _execute(file: Path) -> ModuleType:
    """Execute a Python file, whatever its suffix is."""
    loader = SourceFileLoader(f"sweep_{file.stem}", os.path.abspath(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _call_stage(file: Path, stage: SweepStage, rows: list[ResultRow]) -> list[Trial]:
    """Call a stage and check the trials that it returns."""
    source = f"{file}: stage {getattr(stage, '__name__', 'of STAGES')!r}"
    with _errors_with_line(file):
        returned: Any = stage(rows)
        trials = list(returned) if isinstance(returned, Iterable) else returned
    if not isinstance(trials, list) or not all(isinstance(trial, Trial) for trial in trials):
        other = [item for item in trials if not isinstance(item, Trial)] if isinstance(trials, list) else [returned]
        raise ConfigError(f"{source} returned a {type(other[0]).__name__}; it must return a list of Trial")
    for trial in trials:
        if (problem := _find_problem(trial)) is not None:
            raise ConfigError(f"{source} returned a trial {problem}")
    return trials


def _find_problem(trial: Trial) -> str | None:
    """Return what is wrong with a trial, as the end of a sentence; None for a correct one."""
    if not isinstance(trial.config, RunConfig):
        return f"with a config of type {type(trial.config).__name__}; it must be a RunConfig"
    if trial.extra_metrics is not None and not callable(trial.extra_metrics):
        return f"with extra_metrics of type {type(trial.extra_metrics).__name__}; it must be a function or None"
    labels: Any = trial.labels
    if not isinstance(labels, Mapping) or not all(isinstance(name, str) for name in labels):
        return f"with labels of type {type(labels).__name__}; they must be a mapping from names to values"
    if columns := sorted(labels.keys() & ROW_COLUMNS):
        return f"with the label {columns[0]!r}, which is the name of a column of its row; rename the label"
    for name, value in labels.items():
        if isinstance(value, Mapping | list | tuple):
            return f"with the label {name!r} of type {type(value).__name__}; it must be a number or a text"
    try:
        encode_row(labels)
    except ValueError as error:
        return f"with a label that a row cannot hold: {error}"
    return None


@contextmanager
def _errors_with_line(file: Path) -> Iterator[None]:
    """Convert exceptions of a sweep file to a ConfigError of one line with the file and the line."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        if not isinstance(error, ConfigError):
            message = f"{type(error).__name__}: {message}"
        raise ConfigError(f"{file}{_error_line(error, file)}: {message}") from error


def _error_line(error: Exception, file: Path) -> str:
    """Return ` line N` for the line of a file at which an exception arose, and the place in another file, if any."""
    path = os.path.abspath(file)
    if isinstance(error, SyntaxError) and error.filename == path:
        return f" line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if not lines:
        return ""
    last = frames[-1]
    explained = last.filename == path or isinstance(error, ConfigError)  # the message of a ConfigError suffices
    return f" line {lines[-1]}" + ("" if explained else f" (in {last.filename} line {last.lineno})")
