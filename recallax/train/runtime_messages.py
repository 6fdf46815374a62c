# pyright: strict
"""Replacement of the messages with which the runtime of `jax.distributed` ends a process.

If a process of a run dies or stops, the runtime of every other one prints a status, a C++ stack and the text of the
failed barrier, and aborts. Python code cannot replace this: it does not run between the message and the abort. The
standard error of each process therefore goes through a child process that replaces these messages by one line, and that
ends with its input.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

LOG_HEADER = re.compile(rb"[DIWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\]")
"""First line of a message of the runtime, with the name of its source file."""
RUNTIME_SOURCES = (
    b"client.h",
    b"coordination_service.cc",
    b"coordination_service_agent.cc",
    b"preemption_sync_manager.cc",
)
OWN_PREFIX = b"recallax: "
"""Start of a message of this project, after which no other one is needed."""
LOST_PROCESS = (
    OWN_PREFIX + b"another process of the run failed, died or stopped, so this one was ended; see the messages of the "
    b"others. The same command resumes the run from its newest checkpoint\n"
)


def filter_standard_error() -> None:
    """Send the standard error of this process through a child process that runs this file."""
    read, write = os.pipe()
    # In its own session it does not receive Ctrl-C, and shows the last lines of this process.
    subprocess.Popen([sys.executable, "-I", __file__], stdin=read, stdout=2, start_new_session=True)
    os.close(read)
    os.dup2(write, 2)
    os.close(write)


def replace_runtime_messages(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Replace the messages of the runtime about failures of other processes.

    Args:
        lines: Lines of a standard error.

    Yields:
        The lines without these messages, and `LOST_PROCESS` instead of the first message that ends the process, unless
        the process has already printed the reason.
    """
    explained = dropping = ended = False
    for line in lines:
        header = LOG_HEADER.match(line)
        if header is not None:
            dropping = ended or header[1] in RUNTIME_SOURCES
            if dropping and line.startswith(b"F"):
                ended = True  # what other threads print until the process is gone is of no use
                if not explained:
                    explained = True
                    yield LOST_PROCESS
        elif line.startswith((OWN_PREFIX, b"Traceback ")):
            dropping = False
        if not dropping:
            explained = explained or line.startswith(OWN_PREFIX)
            yield line


if __name__ == "__main__":
    for output in replace_runtime_messages(sys.stdin.buffer):
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
