"""Output of commands: streams that escape what could control a terminal, and consoles for live displays.

Names of files, configs, logs and arguments reach nearly every message, also those of warnings and of libraries, and may
contain escape sequences or bytes that are not UTF-8. A command therefore runs inside `escaped_output`, which is the one
place that makes its output harmless.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from recallax.external_file import printable

type TextStream = Any
"""An object with the methods of `io.TextIOBase`."""
type Console = Any
"""A `rich.console.Console`; rich is imported only for a terminal."""
LAYOUT = ("\n", "\t")
"""Control characters that are not escaped."""


class EscapingStream:
    """A text stream that escapes control characters, and characters that the stream below cannot encode.

    Line ends and tabs remain. Everything but writing is that of the stream below, except that it is no terminal:
    libraries must not add colors, whose escape sequences would be escaped too.

    Args:
        stream: The stream below.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        safe = "".join(part if part in LAYOUT else printable(part) for part in re.split(r"([\n\t])", text))
        self._stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is written to `sys.stdout` and `sys.stderr`, as `EscapingStream` does. May be nested."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = EscapingStream(out), EscapingStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


@contextmanager
def live_display(display: Any) -> Iterator[None]:
    """Show a live display of rich, and escape what is printed meanwhile, which rich prints above the display.

    Args:
        display: A `rich.live.Live` or `rich.progress.Progress` on a console of `live_console`. rich does not escape its
            content; use `recallax.external_file.printable`.
    """
    with display, escaped_output():
        yield


def live_console() -> Console:
    """Return a console for live displays; None if the standard output is not a terminal."""
    stream = sys.stdout
    while isinstance(stream, EscapingStream):
        stream = stream._stream
    if not stream.isatty():
        return None
    import rich.console

    return rich.console.Console(file=stream)
