"""The log of a run: one JSON object per line, and the same values for TensorBoard.

Reports read `log.jsonl` only. Every row has `kind`, `step`, `fingerprint` (of the config) and `seconds`, then its
values. Numbers that JSON cannot represent are the strings "nan", "inf" and "-inf", so that `float(value)` reads every
number. Only process 0 of a multi-process run writes.
"""

import importlib.metadata
import json
import math
import operator
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from recallax import __version__
from recallax.atomic_files import write_atomic
from recallax.external_file import JsonTypes, open_regular_file, parse_json_row, read_json_lines

type RowKind = Literal["run", "train", "eval", "event"]
type LogRow = dict[str, Any]
RESERVED_KEYS: dict[str, JsonTypes] = {"kind": str, "step": int, "fingerprint": str, "seconds": (int, float)}
"""Keys that every row has, and their types; values must have other names."""
TAIL_BYTES = 2**16
"""Bytes at the end of a log in which `read_last_row` searches."""
GIT_TIMEOUT_SECONDS = 10


class LogError(RuntimeError):
    """A log cannot be written, or a file is not a log."""


class RunLog:
    """Appends rows to the log of a run; a context manager.

    Each row is one write to the operating system, so a kill can truncate the last row only; opening removes such a row.
    `seconds` is the time since the start of the run; a resumed run continues from its last row.

    Args:
        path: The log file.
        fingerprint: Fingerprint of the config.
        tensorboard: Folder of the TensorBoard files; None for no such files.
        process_index: Index of this process; only process 0 writes.

    Raises:
        LogError: The log cannot be read or written.
    """

    def __init__(self, path: Path, fingerprint: str, *, tensorboard: Path | None = None, process_index: int = 0):
        self.path = path
        self._fingerprint = fingerprint
        self._tensorboard = tensorboard
        self._summary_writer: Any = None
        self._purge_step: int | None = None
        self._is_writer = process_index == 0
        self._start = time.monotonic()
        if self._is_writer and path.exists():
            self._rewrite(read_log(path))

    def write_run_row(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the "run" row, with `environment()` and the git commit.

        Args:
            step: Step from which the run starts or resumes.
            values: Additional values.

        Raises:
            LogError: The row cannot be written.
        """
        if self._is_writer:
            self.write("run", step, {**environment(), "commit": git_commit(), **values})

    def write(self, kind: RowKind, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Numbers of "train" and "eval" rows are also written to TensorBoard, as `train/<name>` and `<split>/<name>`.

        Args:
            kind: Kind of the row.
            step: Number of steps so far.
            values: Numbers (0-d arrays too), strings, booleans or None, by name.

        Raises:
            ValueError: A value has the name of a reserved key.
            LogError: The row cannot be written.
        """
        if not self._is_writer:
            return
        if reserved := [name for name in RESERVED_KEYS if name in values]:
            raise ValueError(f"{', '.join(reserved)} is a reserved key of log rows; rename the value")
        seconds = round(time.monotonic() - self._start, 3)
        row = {"kind": kind, "step": step, "fingerprint": self._fingerprint, "seconds": seconds}
        row |= {name: to_json_scalar(value) for name, value in values.items()}
        self._append((json.dumps(row, allow_nan=False) + "\n").encode())
        if self._tensorboard is not None and kind in ("train", "eval"):
            self._write_tensorboard(str(values.get("split", kind)), step, row)

    def truncate(self, step: int) -> None:
        """Remove the rows after a step, so that a resumed run does not log a step twice.

        TensorBoard files cannot be truncated; its reader is told to purge the same steps.

        Args:
            step: Step from which the run resumes.

        Raises:
            LogError: The log cannot be read or written.
        """
        if self._is_writer and self.path.exists():
            self._rewrite([row for row in read_log(self.path) if row["step"] <= step])
            self._purge_step = step + 1

    def close(self) -> None:
        """Flush the TensorBoard files; closing twice does nothing."""
        if self._summary_writer is not None:
            self._summary_writer.close()
            self._summary_writer = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                written = file.write(line)
        except OSError as error:
            raise LogError(f"{self.path} cannot be written: {error}") from error
        if written != len(line):
            raise LogError(
                f"{self.path}: {written} of {len(line)} bytes of a row were written; the disk is probably full"
            )

    def _rewrite(self, rows: list[LogRow]) -> None:
        try:
            write_atomic(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        except OSError as error:
            raise LogError(f"{self.path} cannot be written: {error}") from error
        self._start = time.monotonic() - (float(rows[-1]["seconds"]) if rows else 0.0)

    def _write_tensorboard(self, prefix: str, step: int, row: LogRow) -> None:
        if self._summary_writer is None:
            from tensorboardX import SummaryWriter

            self._summary_writer = SummaryWriter(str(self._tensorboard), purge_step=self._purge_step)
        for name, value in row.items():
            if name not in RESERVED_KEYS and isinstance(value, int | float):
                self._summary_writer.add_scalar(f"{prefix}/{name}", value, step)


def read_log(path: Path) -> list[LogRow]:
    """Read the rows of a log.

    Args:
        path: The log file.

    Returns:
        Its rows, oldest first, without a truncated last line, which a kill may leave.

    Raises:
        LogError: The file cannot be read, or a complete line is not a row.
    """
    try:
        return read_json_lines(path, RESERVED_KEYS)
    except OSError as error:
        raise LogError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise LogError(f"{error}") from error


def read_last_row(path: Path, kind: RowKind) -> LogRow | None:
    """Read the last row of a kind from the end of a log, which another process may be writing.

    Args:
        path: The log file.
        kind: Kind of the row.

    Returns:
        The row; None if the file cannot be read, or its last `TAIL_BYTES` have no such row.
    """
    try:
        with open_regular_file(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):  # not a complete row
            row = parse_json_row(line, RESERVED_KEYS)
            if row["kind"] == kind:
                return row
    return None


def parse_number(value: Any) -> int | float | None:
    """Convert a value of a row to a number.

    Args:
        value: A JSON value. Numbers that JSON cannot express are the strings "nan", "inf" and "-inf".

    Returns:
        The number; None if the value is not a number, or an integer beyond the range of floats.
    """
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        float(value)
    except OverflowError:
        return None
    return value


def finite_number(value: Any) -> float | None:
    """Convert a value of a row to a float; None if it is not a finite number.

    Args:
        value: A JSON value, as in `parse_number`.
    """
    number = parse_number(value)
    return float(number) if number is not None and math.isfinite(number) else None


def environment() -> dict[str, str | int]:
    """Return the versions, devices, cores and XLA flags, which may change the rounding of results."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": available_cores(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "recallax": __version__,
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def git_commit() -> str | None:
    """Return the git commit of the source of recallax.

    Returns:
        The commit, with "+dirty" if tracked files other than results (*.jsonl) differ from it. None if the source is
        not tracked by git, such as an installed copy inside another repository.
    """
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)*.jsonl")
        return _git(folder, "rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    """Run git without the lock of the index, which would make a command of the user in the same repository fail."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS
    ).stdout.strip()


def available_cores() -> int:
    """Return the number of cores that this process may use, which affects the rounding of results on CPU."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def to_json_scalar(value: Any) -> str | int | float | bool | None:
    """Convert a value to one that JSON has; NaN and infinity to the strings "nan", "inf" and "-inf".

    Args:
        value: A number (0-d arrays too), string, boolean or None.

    Raises:
        TypeError: The value is something else.
    """
    if value is None or isinstance(value, str | bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
    return number if math.isfinite(number) else str(number)
