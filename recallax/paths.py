# pyright: strict
"""Paths that users give, and symbolic links in folders that recallax writes."""

import os
from pathlib import Path

from recallax.config_errors import ConfigError


class SymlinkError(OSError):
    """A symbolic link in a folder of recallax leads out of it; recallax would write or delete files elsewhere."""


def expand_user(path: Path | str) -> Path:
    """Expand a leading `~` or `~USER`.

    Args:
        path: A path.

    Returns:
        The absolute path.

    Raises:
        ConfigError: There is no such user, or the path is not UTF-8, which tensorstore requires, or it has a null
            character, which no file system allows.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        home = expanded.split(os.sep)[0]
        raise ConfigError(f"{text} cannot be used: {home!r} has no home folder; give the whole path, or ./{text}")
    if "\0" in expanded:
        raise ConfigError(f"{text!r} cannot be used: no path has a null character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in expanded):  # a byte that Python could not decode
        raise ConfigError(f"{text!r} cannot be used: it is not UTF-8, as checkpoints require; rename the folder")
    return Path(expanded).absolute()


def reject_link(path: Path) -> None:
    """Raise an error if a path is a symbolic link that leads out of the folder in which it is.

    Args:
        path: A file or folder, which may not exist.

    Raises:
        SymlinkError: It is such a link.
        OSError: The path cannot be read.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise SymlinkError(
            f"{path} is a symbolic link to {os.readlink(path)}, outside of its folder, where recallax neither writes "
            "nor deletes files; replace the link by what it names, or choose another folder"
        )


def reject_links(*folders: Path) -> None:
    """Raise an error if a folder has a symbolic link that leads out of it. Its subfolders are not read.

    Args:
        *folders: Folders, which may themselves be links, and may not exist.

    Raises:
        SymlinkError: One has such a link.
        OSError: One cannot be read.
    """
    for folder in folders:
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                reject_link(path)
