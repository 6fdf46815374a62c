"""The folder of one run: its files, its lock, and the check of its config.

    config.json  log.jsonl  tensorboard/  checkpoints/  lock

A folder belongs to one config permanently, and to one job at a time. Only process 0 of a multi-process run takes the
lock and writes; the other processes use the same paths and write nothing.
"""

import fcntl
import json
import os
import re
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from recallax.atomic_files import write_atomic
from recallax.config import Config, diff_json, fingerprint, to_json
from recallax.external_file import MAX_CONFIG_BYTES, parse_json_object, read_regular_file
from recallax.paths import SymlinkError, expand_user, reject_links

EARLIER_SCHEMAS = (1,)
"""Schemas of configs whose fingerprints may name folders."""


class RunFolderError(RuntimeError):
    """A run cannot use its folder; the message has the path, the problem and the remedy."""


class RunFolderInUseError(RunFolderError):
    """Another job uses the folder."""


class RunFolderWarning(UserWarning):
    """A run can use its folder, but another job may be using it too."""


def run_folder_name(name: str, config: Config) -> str:
    """Return the name of the folder of a new run, `<name>-<fingerprint>`.

    Args:
        name: Name of the config.
        config: The config.

    Returns:
        A name that is equal for two runs exactly when name and config are equal.

    Raises:
        RunFolderError: The name contains other characters than A-Z a-z 0-9 . _ - or starts with a dot.
    """
    return f"{_validate_name(name)}-{fingerprint(config)}"


def run_folder_path(parent: Path, name: str, config: Config) -> Path:
    """Return the folder of a run, which may have been created by an earlier version of recallax.

    Args:
        parent: Folder of runs.
        name: Name of the config.
        config: The config.

    Returns:
        `parent / <name>-<fingerprint>`, where the fingerprint is that of `recorded_fingerprint`.

    Raises:
        RunFolderError: The name is not valid, as in `run_folder_name`.
    """
    prefix = f"{_validate_name(name)}-"
    return parent / (prefix + recorded_fingerprint(parent, config, prefix=prefix))


def recorded_fingerprint(parent: Path, config: Config, *, prefix: str = "") -> str:
    """Return the fingerprint that names the folder of a run, or would name it.

    Fingerprints depend on the schema of configs, so the folders of earlier versions have other names.

    Args:
        parent: Folder of runs.
        config: The config.
        prefix: Text before the fingerprint in the name of the folder.

    Returns:
        The fingerprint of an earlier schema if only a folder of that name exists, else that of the current schema.
    """
    current = fingerprint(config)
    if not (parent / (prefix + current)).exists():
        for schema in EARLIER_SCHEMAS:
            earlier = fingerprint(config, schema=schema)
            if (parent / (prefix + earlier)).is_dir():
                return earlier
    return current


class RunFolder:
    """An open run folder, created if it does not exist; a context manager that releases its lock.

    The lock of a process that died is taken over.

    Args:
        path: The folder.
        config: Config of the run.
        process_index: Index of this process; only process 0 locks and writes.

    Raises:
        RunFolderError: The folder cannot be written, contains something that is not a run or a run of another config
            (the message shows how the configs differ), has a symbolic link that leads out of it, or is in use by
            another job (`RunFolderInUseError`).
        ConfigError: The path starts with `~` and the name of no user, is not UTF-8, or has a null character.
    """

    def __init__(self, path: Path | str, config: Config, *, process_index: int = 0) -> None:
        self.path = expand_user(path)
        self.config_file = self.path / "config.json"
        self.log_file = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None
        if process_index:
            return
        try:
            self._open(config)
        except SymlinkError as error:
            self.close()
            raise RunFolderError(str(error)) from error
        except OSError as error:
            self.close()
            raise RunFolderError(
                f"the run folder {self.path} cannot be written: {error}; "
                "choose another folder, or make this one writable and free some space"
            ) from error
        except RunFolderError:
            self.close()
            raise

    def _open(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config_file.exists() and any(not _is_run_file(name) for name in os.listdir(self.path)):
            raise RunFolderError(
                f"{self.path} is not empty and contains no config.json, so it is not a run; choose a new folder"
            )
        reject_links(self.path, self.checkpoints, self.tensorboard)
        self._lock = _acquire_lock(self.path / "lock")
        if self.config_file.exists():
            _check_same_config(self.config_file, config)
        else:
            write_atomic(self.config_file, json.dumps(to_json(config), indent=1, allow_nan=False) + "\n")
        self.checkpoints.mkdir(exist_ok=True)

    def close(self) -> None:
        """Release the lock; closing twice does nothing."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)  # not removed: two later jobs could then lock two different files
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a run.

    Args:
        folder: Folder of the run.

    Returns:
        The decoded JSON, for `recallax.config.from_json`.

    Raises:
        RunFolderError: The folder is not that of a run, or the file is damaged.
    """
    path = folder / "config.json"
    try:
        return parse_json_object(read_regular_file(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise RunFolderError(f"{folder} is not a run folder: {error}") from error
    except ValueError as error:
        raise RunFolderError(f"{path} is not a config: {error}; restore it, or choose a new folder") from error


def find_folder_user(folder: Path) -> str | None:
    """Find the process that uses a run folder.

    Args:
        folder: Folder of a run, which may not exist.

    Returns:
        The process as printable text; None if the folder has no lock, or no process holds it.
    """
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _lock_holder(descriptor) or "another job"
    except OSError:  # the file system has no locks
        return None
    finally:
        os.close(descriptor)
    return None


def _is_run_file(name: str) -> bool:
    """Return True for a file that an interrupted creation of the folder may have left."""
    return name == "lock" or (name.startswith(".config.json.") and name.endswith(".tmp"))


def _check_same_config(path: Path, config: Config) -> None:
    if differences := diff_json(read_config(path.parent), to_json(config)):
        raise RunFolderError(
            f"{path.parent} belongs to a run of another config:\n  "
            + "\n  ".join(differences)
            + "\nchoose a new folder for this config, or train the config of that folder"
        )


def _validate_name(name: str) -> str:
    """Reject names that could leave the parent folder or send control codes to a terminal."""
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,100}", name):
        raise RunFolderError(
            f"{name!r} cannot name a run; use 1 to 100 of the characters A-Z a-z 0-9 . _ - and no leading dot"
        )
    return name


def _acquire_lock(path: Path) -> int:
    """Lock the file, write the name of this process to it, and return the descriptor that keeps the lock.

    The kernel releases the lock when the process ends; the text in the file is only for messages. A file created with
    O_EXCL would outlive a killed job, and taking it over would be a race.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _lock_holder(descriptor)
        os.close(descriptor)
        raise RunFolderInUseError(
            f"{path.parent} is in use by {holder or 'another job'}; wait for it, stop it, or choose another folder"
        ) from error
    except OSError:
        os.close(descriptor)
        raise
    host = socket.gethostname()
    holder = _lock_holder(descriptor)
    if holder and not holder.endswith(f" on {host}"):
        warnings.warn(
            f"took over {path.parent} from {holder}, which did not close it; if it still runs, stop one of the two",
            RunFolderWarning,
            stacklevel=4,
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {host}".encode(), 0)
    return descriptor


def _lock_holder(descriptor: int) -> str:
    """Return the process that the lock file names, as printable text."""
    text = os.pread(descriptor, 300, 0).decode("utf-8", "replace")
    return "".join(c for c in text if c.isprintable())
