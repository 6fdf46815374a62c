# pyright: strict
"""Files that may come from anywhere: they are read with limits, and their names are printed without control codes.

A path can name a pipe or a device, which never ends, and a small JSON text can exhaust the stack of a parser. Both are
rejected before anything of that size is read or built.
"""

import codecs
import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

MAX_JSON_DEPTH = 64
"""Levels of nesting of a JSON text; configs of recallax have about ten."""
MAX_CONFIG_BYTES = 2**20
"""Size of a config file; those of published models have a few kilobytes."""
MAX_REPR_LENGTH = 80
"""Characters of a value in an error message."""
BRACKET_DEPTH = {"{": 1, "[": 1, "}": -1, "]": -1}
type JsonTypes = type | tuple[type, ...]
"""Type of a JSON value, or several types."""
STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)


def open_regular_file(path: Path) -> BinaryIO:
    """Open a regular file, or a symbolic link to one, for reading.

    Args:
        path: The file.

    Returns:
        The open file.

    Raises:
        OSError: If the file cannot be opened, or is a pipe, a device, a socket or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of limited size.

    Args:
        path: The file.
        max_bytes: Largest size.

    Returns:
        Its content.

    Raises:
        OSError: If the file cannot be read, or is not a regular file.
        ValueError: If the file is larger; the message has the form of a clause.
    """
    with open_regular_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return data


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON text that must be an object without repeated keys.

    Args:
        text: UTF-8 encoded JSON.

    Returns:
        The object.

    Raises:
        ValueError: If the text is not such an object, or is nested too deep; the message has the form of a clause.
    """
    decoded = text.decode("utf-8")
    if _exceeds_depth(decoded):
        raise ValueError(f"its JSON is nested too deep, more than {MAX_JSON_DEPTH} levels")
    try:
        data = json.loads(decoded, object_pairs_hook=_reject_duplicate_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("its JSON is not an object")
    return cast("dict[str, Any]", data)


def parse_json_row(text: bytes, required: Mapping[str, JsonTypes]) -> dict[str, Any]:
    """Parse a row of a table: a JSON object with certain keys.

    Args:
        text: UTF-8 encoded JSON, with or without a byte-order mark.
        required: Keys that the object must have, and the types of their values. A boolean is not an integer.

    Returns:
        The object.

    Raises:
        ValueError: If the text is not such an object; the message has the form of a clause.
    """
    row = parse_json_object(text.removeprefix(codecs.BOM_UTF8))
    for name, types in required.items():
        if not isinstance(row.get(name), types) or isinstance(row[name], bool):
            raise ValueError(f"its {name!r} is missing or of another type")
    return row


def read_json_lines(path: Path, required: Mapping[str, JsonTypes]) -> list[dict[str, Any]]:
    """Read a table with one JSON object per line.

    Blank lines and a byte-order mark are skipped, and so is an incomplete last line, which a kill may leave.

    Args:
        path: The file.
        required: Keys that every object must have, as in `parse_json_row`.

    Returns:
        The objects in the order of the file.

    Raises:
        OSError: If the file cannot be read, or is not a regular file.
        ValueError: If a line is not such an object; the message names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    with open_regular_file(path) as file:
        for number, line in enumerate(file, 1):
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            try:
                rows.append(parse_json_row(line, required))
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                cause = error.__cause__
                syntax = isinstance(cause, json.JSONDecodeError)
                reason = f"it is not JSON: {cause.msg} at column {cause.colno}" if syntax else error
                raise ValueError(f"{path} line {number} is not a row: {reason}; restore or remove the line") from error
    return rows


def printable(text: str) -> str:
    r"""Escape all characters that can control a terminal or cannot be encoded.

    Args:
        text: Any text.

    Returns:
        The text in one line, with escapes such as `\x1b` and `\n`.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def short_repr(value: Any) -> str:
    """Return the `repr` of a value for an error message.

    Args:
        value: A value of at most `MAX_JSON_DEPTH` levels.

    Returns:
        At most `MAX_REPR_LENGTH` characters.
    """
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        text = f"a value of type {type(value).__name__} that is too large to print"
    return text if len(text) <= MAX_REPR_LENGTH else f"{text[: MAX_REPR_LENGTH - 3]}..."


def _exceeds_depth(text: str) -> bool:
    """Return whether brackets outside of strings are nested deeper than `MAX_JSON_DEPTH`."""
    if text.count("{") + text.count("[") <= MAX_JSON_DEPTH:
        return False
    depth = 0
    for match in STRING_OR_BRACKET.finditer(text):
        depth += BRACKET_DEPTH.get(match.group(), 0)
        if depth > MAX_JSON_DEPTH:
            return True
    return False


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is repeated")
    return result
