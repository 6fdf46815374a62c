"""A cache of folders with derived files; the name of a folder determines its content."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from recallax.atomic_files import create_folder_atomic
from recallax.config import ConfigError
from recallax.external_file import parse_json_object
from recallax.paths import expand_user, reject_link

CACHE_VARIABLE = "RECALLAX_CACHE"
"""Environment variable that sets the cache folder."""
CHECKSUM_FILE = "sha256.json"
"""File of a cached folder with the checksums of its other files."""


def cache_root() -> Path:
    """Locate the cache.

    Returns:
        `$RECALLAX_CACHE`; if it is not set, `recallax` in `$XDG_CACHE_HOME` or else in `~/.cache`.

    Raises:
        ConfigError: The path starts with `~`, and that home folder is not known.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return expand_user(given)
    return expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "recallax"


def cached_folder(name: str, populate: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, and create it if it is missing.

    The folder is created atomically: `populate` writes to a temporary folder, which is renamed when its files are on
    disk. One process creates it while other processes wait. On a file system without locks several processes may create
    equal folders, and the first to finish is kept. The folder contains checksums of its files, which are verified once
    per process. A folder without checksums, of an earlier version, is created again.

    Args:
        name: Path of the folder within the cache; it must determine the content.
        populate: Writes the files to an empty folder.

    Returns:
        The folder.

    Raises:
        ConfigError: The cache cannot be read or written, or a file of the folder has changed.
    """
    folder = cache_root() / name
    try:
        if not _is_complete(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock_file = folder.with_name(f".{folder.name}.lock")
            reject_link(lock_file)
            with open(lock_file, "w") as lock:
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_complete(folder):
                    _populate(folder, populate)
    except OSError as error:
        raise ConfigError(
            f"the cache {cache_root()} cannot be written: {error}; free some space, or set {CACHE_VARIABLE} to "
            "another folder"
        ) from error
    _verify(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / CHECKSUM_FILE).is_file()


def _populate(folder: Path, populate: Callable[[Path], None]) -> None:
    def write(temporary: Path) -> None:
        populate(temporary)
        checksums = _file_checksums(temporary)
        (temporary / CHECKSUM_FILE).write_text(json.dumps(checksums, indent=1) + "\n")

    if folder.is_dir():
        shutil.rmtree(folder)
    try:
        create_folder_atomic(folder, write)
    except OSError:
        if not _is_complete(folder):  # unless another process was faster
            raise


@lru_cache(maxsize=64)
def _verify(folder: Path) -> None:
    """Compare the files of a folder with its checksums; raises ConfigError if they differ."""
    try:
        expected, actual = parse_json_object((folder / CHECKSUM_FILE).read_bytes()), _file_checksums(folder)
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    for file in sorted(expected.keys() | actual.keys()):
        if expected.get(file) != actual.get(file):
            raise _damaged(folder, f"the checksum of {file} is {actual.get(file)}, expected {expected.get(file)}")


def _damaged(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"{folder} is damaged ({reason}); delete it, and it is created again")


def _file_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder but `CHECKSUM_FILE`, by its path in the folder."""
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / CHECKSUM_FILE:
            with open(path, "rb") as file:
                checksums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums
