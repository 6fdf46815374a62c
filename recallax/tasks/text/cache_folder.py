"""A cache of folders with derived files; the name of a folder determines its content."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from recallax.config import ConfigError

CACHE_VARIABLE = "RECALLAX_CACHE"
"""Environment variable that sets the cache folder."""


def cache_root() -> Path:
    """Locate the cache.

    Returns:
        `$RECALLAX_CACHE`; if it is not set, `recallax` in `$XDG_CACHE_HOME` or else in `~/.cache`.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "recallax"


def cached_folder(name: str, populate: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, and create it if it is missing.

    The folder is created atomically: `populate` writes to a temporary folder, which is renamed when its files are on
    disk. One process creates it while other processes wait. On a file system without locks several processes may create
    equal folders, and the first to finish is kept.

    Args:
        name: Path of the folder within the cache; it must determine the content.
        populate: Writes the files to an empty folder.

    Returns:
        The folder.

    Raises:
        ConfigError: The cache cannot be written.
    """
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _populate(folder, populate)
    except OSError as error:
        raise ConfigError(
            f"the cache {cache_root()} cannot be written: {error}; free some space, or set {CACHE_VARIABLE} to "
            "another folder"
        ) from error
    return folder


def _populate(folder: Path, populate: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        populate(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        with suppress(OSError):  # another process was faster
            os.rename(temporary, folder)
        if not folder.is_dir():
            raise OSError(f"{temporary} could not be renamed to {folder}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
