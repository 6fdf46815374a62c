# pyright: strict
"""Options that name a file or folder to write, and the check that it can be written.

An option is marked by its type, and `recallax.cli.options` checks every marked option before the command does any work.
"""

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAliasType, get_args, get_origin, get_type_hints

from recallax.config import ConfigError

PROBE_BYTES = 4096
"""Bytes that are written to find out whether a file system has free space."""


@dataclass(frozen=True)
class Output:
    """Kind of the file or folder that an option names."""

    kind: Literal["file", "folder", "new folder"]
    """A file that may be replaced, a folder that may exist, or a folder that must not exist."""


type OutputFile = Annotated[Path, Output("file")]
type OutputFolder = Annotated[Path, Output("folder")]
type NewOutputFolder = Annotated[Path, Output("new folder")]


def output_options(options: type) -> dict[str, Output]:
    """Return the output options of a command.

    Args:
        options: The options dataclass of the command.

    Returns:
        Outputs by the name of their field.
    """
    outputs = ((name, _find_output(hint)) for name, hint in get_type_hints(options, include_extras=True).items())
    return {name: output for name, output in outputs if output is not None}


def check_outputs(options: object) -> None:
    """Check that all output options can be written. Nothing is created.

    Args:
        options: The options of a command. Options that are None, which have a default, are not checked.

    Raises:
        ConfigError: An output cannot be written.
    """
    for name, output in output_options(type(options)).items():
        path = getattr(options, name)
        if path is not None:
            _check_output(path, output, f"--{name.replace('_', '-')}")


def _find_output(hint: Any) -> Output | None:
    """Return the mark in a type hint, also inside of an alias and of a union."""
    if isinstance(hint, TypeAliasType):
        return _find_output(hint.__value__)
    if get_origin(hint) is Annotated:
        return next((mark for mark in get_args(hint)[1:] if isinstance(mark, Output)), None)
    return next((output for part in get_args(hint) if (output := _find_output(part)) is not None), None)


def _check_output(path: Path, output: Output, option: str) -> None:
    if "\0" in str(path):
        raise ConfigError(f"{option} {str(path)!r} cannot be written: no path has a null character; remove it")
    if output.kind == "new folder" and os.path.lexists(path):
        raise ConfigError(f"{option} {path} already exists; move it away, or choose another {option}")
    try:
        if output.kind != "file":
            _check_folder(path)
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        elif path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file")
        else:
            _check_folder(path.parent)
    except OSError as error:
        noun = "file" if output.kind == "file" else "folder"
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}; choose another {noun}") from error


def _check_folder(folder: Path) -> None:
    """Write a file without a name in a folder, or in the nearest folder above it that exists. Raises OSError."""
    path = folder.absolute()
    existing = next(parent for parent in (path, *path.parents) if _exists(parent))
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a folder")
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(bytes(PROBE_BYTES))


def _exists(path: Path) -> bool:
    """Return whether there is anything at a path. Raises OSError for a path that cannot exist, as with a long name."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
