"""The folder of one run: what is in it, who may write there, and for which config.

    config.json  log.jsonl  tensorboard/  checkpoints/  lock

A folder belongs to one config for ever and to one job at a time. Only process 0 of a multi-process run takes the
lock and writes; the other processes hold the same paths and touch nothing.
"""

import fcntl
import json
import os
import re
import secrets
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from recallax.config import Config, ConfigError, diff, fingerprint, from_json, to_json


class RunFolderError(RuntimeError):
    """A run cannot use its folder; the message says what, where, and the remedy."""


class RunFolderWarning(UserWarning):
    """A run goes on in its folder, but something there deserves a look."""


def run_folder_name(name: str, config: Config) -> str:
    """`<name>-<fingerprint>`: equal configs share a folder, different ones never do.

    Raises RunFolderError for a name that could leave the parent folder or confuse a terminal.
    """
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,100}", name):
        raise RunFolderError(
            f"{name!r} cannot name a run; use 1 to 100 of the characters A-Z a-z 0-9 . _ - and no leading dot"
        )
    return f"{name}-{fingerprint(config)}"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a kill at any moment, sees the old text or the new, never a part.

    A symbolic link at `path` is replaced, not followed. Raises OSError; the temporary file is gone either way.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """An open run folder; a context manager that gives the lock back.

    Opening creates the folder or re-opens it, in a fraction of a second either way. Raises RunFolderError if the
    folder cannot be written, holds something that is not a run, holds a run of another config (the message shows
    how the configs differ), or is in use by another job. The lock of a process that died is taken over.
    """

    def __init__(self, path: Path | str, config: Config, *, process_index: int = 0) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None
        if process_index:
            return
        try:
            self._open(config)
        except OSError as error:
            self.close()
            raise RunFolderError(
                f"the run folder {self.path} cannot be written: {error}; "
                "choose another folder, or make this one writable and give it space"
            ) from error
        except RunFolderError:
            self.close()
            raise

    def _open(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config_file.exists() and any(not _is_run_file(name) for name in os.listdir(self.path)):
            raise RunFolderError(
                f"{self.path} is not empty and holds no config.json, so it is not a run; choose a new folder"
            )
        self._lock = _acquire_lock(self.path / "lock")
        if self.config_file.exists():
            _check_same_config(self.config_file, config)
        else:
            write_atomic(self.config_file, json.dumps(to_json(config), indent=1, allow_nan=False) + "\n")
        self.checkpoints.mkdir(exist_ok=True)

    def close(self) -> None:
        """Give the lock back; closing twice does nothing.

        The lock file is emptied and stays: removing it would let two later jobs lock two different files.
        """
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of a run's config. Raises RunFolderError if the folder is not a run's, or the file is damaged."""
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"{folder} is not a run's folder: {error}") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is not JSON ({error}); restore it, or choose a new folder") from error
    if not isinstance(data, dict):
        raise RunFolderError(f"{path} does not hold an object; restore it, or choose a new folder")
    return data


def _is_run_file(name: str) -> bool:
    """Whether an interrupted first opening may have left this file."""
    return name == "lock" or (name.startswith(".config.json.") and name.endswith(".tmp"))


def _check_same_config(path: Path, config: Config) -> None:
    data = read_config(path.parent)
    if data == json.loads(json.dumps(to_json(config))):
        return
    try:
        lines = diff(from_json(data, Config), config)
    except ConfigError as error:  # written by another version of recallax: it differs, but cannot be compared
        lines = [str(error)]
    raise RunFolderError(
        f"{path.parent} belongs to a run of another config:\n  "
        + "\n  ".join(lines)
        + "\nchoose a new folder for this config, or run the one that is there"
    )


def _acquire_lock(path: Path) -> int:
    """Lock the file and write who holds it; returns the descriptor that holds the lock.

    The kernel's lock decides, because it dies with its process: what the file says is only for the message. A
    file made with O_EXCL would outlive a killed job, and taking such a file over is a race.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _lock_holder(descriptor)
        os.close(descriptor)
        raise RunFolderError(
            f"{path.parent} is in use by {holder or 'another job'}; wait for it, stop it, or choose another folder"
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    here = socket.gethostname()
    holder = _lock_holder(descriptor)
    if holder and not holder.endswith(f" on {here}"):
        warnings.warn(
            f"took over {path.parent} from {holder}, which did not close it; if it still runs, stop one of the two",
            RunFolderWarning,
            stacklevel=4,
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {here}".encode(), 0)
    return descriptor


def _lock_holder(descriptor: int) -> str:
    """Who the lock file names, as printable text (another program may have written anything there)."""
    text = os.pread(descriptor, 300, 0).decode("utf-8", "replace")
    return "".join(c for c in text if c.isprintable())
