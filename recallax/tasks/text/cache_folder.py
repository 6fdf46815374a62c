"""Folders of derived files, made once: what is in one is a function of its name."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from recallax.config import ConfigError

CACHE_VARIABLE = "RECALLAX_CACHE"


def cache_root() -> Path:
    """`$RECALLAX_CACHE`, or `recallax` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "recallax"


def cached_folder(name: str, populate: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; where it is missing, `populate` fills it.

    It appears whole or not at all: `populate` gets an empty folder beside it, which is renamed when its files are on disk.
    One process makes it while the others that want it wait. On a file system without locks several may make it, and the
    first to finish wins: all make the same. Raises ConfigError where the cache cannot be written.
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
            f"the cache {cache_root()} cannot be written: {error}; make room there, or set {CACHE_VARIABLE} to another folder"
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
        with suppress(OSError):  # another process was quicker
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
