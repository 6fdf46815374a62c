# pyright: strict
"""Files and folders that are replaced atomically and survive a power loss.

A rename is atomic for a reader, also after a kill. After a power loss, a file system may have the rename without the
content, or neither. Every function therefore writes files and folders to the disk before it returns.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from recallax.paths import reject_link

UNSUPPORTED_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that cannot write a folder to the disk separately."""
TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
"""Names that `_temporary_path` gives."""


def write_atomic(path: Path, text: str) -> None:
    """Replace a file atomically, so that a reader sees the old text or the new one, also after a kill.

    Args:
        path: The file; a symbolic link is replaced, not followed.
        text: Its new content.

    Raises:
        OSError: The file cannot be written; the temporary file is removed.
    """
    temporary = _temporary_path(path)
    try:
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replace_path(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of a write, such as a full disk, names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def create_folder_atomic(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Create a folder with all of its files or not at all.

    A killed process leaves its temporary folder. The next call for a folder beside it removes it: the process that
    writes a temporary folder holds a lock on it, which the kernel releases when the process ends.

    Args:
        folder: The new folder. Its parent folders are created.
        write_files: Writes the files into the temporary folder that it is given, which is then renamed. Its exceptions
            are passed on, and the temporary folder is removed.

    Raises:
        OSError: A file cannot be written, or the folder exists and is not empty, or is a symbolic link.
    """
    reject_link(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_folders(folder.parent)
    temporary, lock = _create_locked_folder(folder)
    try:
        write_files(temporary)
        sync_tree(temporary)
        replace_path(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def replace_path(source: Path, target: Path) -> None:
    """Rename a file or folder, and write the folders that contain it to the disk.

    Args:
        source: A file whose content is on disk, or a folder for which `sync_tree` was called.
        target: Its new path. A file or an empty folder there is replaced.

    Raises:
        OSError: It cannot be renamed.
    """
    os.replace(source, target)
    for folder in dict.fromkeys((target.parent, source.parent)):
        _sync_folder(folder)


def sync_tree(folder: Path) -> None:
    """Write a folder, everything in it, and its entry in the parent folder to the disk.

    Args:
        folder: The folder.

    Raises:
        OSError: A file cannot be read, or not be written to the disk.
    """
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(path, name))
        _sync_folder(Path(path))
    _sync_folder(folder.parent)


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _create_locked_folder(folder: Path) -> tuple[Path, int]:
    """Create a temporary folder, and return it with the descriptor that keeps its lock."""
    while True:
        temporary = _temporary_path(folder)
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process took it for abandoned before it was locked
            continue
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # some network file systems have no locks; folders on them are never removed
            locked = not isinstance(error, BlockingIOError)
        if locked and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def _remove_abandoned_folders(parent: Path) -> None:
    """Remove the temporary folders in a folder that no process has locked."""
    with suppress(OSError):  # the folder cannot be listed
        for path in parent.iterdir():
            _remove_abandoned_folder(path)


def _remove_abandoned_folder(path: Path) -> None:
    """Remove a temporary folder, unless another process writes or removes it, or it cannot be locked."""
    if not TEMPORARY_NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED_FSYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
