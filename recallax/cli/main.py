"""Entry point of the command line: looks up a command, imports its module and runs it.

Only the module of the requested command is imported. `recallax --help`, `recallax list`, the help of every command and
the checks of a config's name do not import JAX.
"""

import importlib
import sys
from typing import NamedTuple

from recallax import __version__
from recallax.cli.config_files import check_config_name, config_names
from recallax.cli.errors import EXIT_OK, EXIT_USAGE, print_error, run_with_error_messages
from recallax.config import suggest_name
from recallax.terminal import escaped_output


class Command(NamedTuple):
    """A command of the command line."""

    arguments: str
    """Its arguments, as the usage text shows them. Commands that begin with CONFIG need the name of a config."""
    summary: str
    """One line for the usage text."""
    module: str = ""
    """Its module in `recallax.cli`; the name of the command where empty."""


COMMANDS = {
    "list": Command("", "list the configs"),
    "show": Command("CONFIG [overrides]", "print a resolved config, its parameter count, state bytes and FLOPs"),
    "train": Command("CONFIG [overrides]", "train a config, or resume its run"),
    "eval": Command("RUN", "evaluate the newest checkpoint of a run"),
    "generate": Command("RUN --prompt TEXT", "generate from text or token ids, or answer rows of the run's task"),
    "calibrate": Command("RUN --context-length N", "make a run that reads longer contexts (LongMamba)"),
    "corpus": Command("CONFIG", "download and tokenize the text of a config, and print its size"),
    "tokenizer": Command(
        "CONFIG --out FILE", "train a BPE tokenizer on the text of a config", module="train_tokenizer"
    ),
    "sweep": Command("FILE", "train the configs that a Python file yields, and collect their results"),
    "export": Command("RUN --to FORMAT", "write the weights of a run as safetensors, StableHLO or Orbax"),
    "import": Command("PATH", "make a run from an export or from a published model", module="import_weights"),
    "report": Command("RUN...", "write an HTML page, a CSV table and a Markdown table about runs"),
    "doctor": Command("", "print versions, devices, extras and the implementations that each op selects"),
}
"""Every command by name."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its arguments; those of the process where None.

    Returns:
        The exit status; `recallax.cli.errors` lists them.

    Raises:
        SystemExit: Help was requested, or an option is wrong; tyro has printed the reason.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with escaped_output():
        return run_with_error_messages(lambda: _run_command(arguments))


def usage() -> str:
    """Return the text that `recallax --help` prints."""
    calls = {f"{name} {command.arguments}".rstrip(): command.summary for name, command in COMMANDS.items()}
    width = max(map(len, calls))
    lines = [f"  recallax {call:{width}}  {summary}" for call, summary in calls.items()]
    return (
        f"recallax {__version__}: sequence models that recall well with little memory\n\n"
        + "\n".join(lines)
        + "\n\n`recallax COMMAND --help` describes the options of a command.\n"
        "`recallax train CONFIG --help` lists every field of a config that can be overridden.\n"
    )


def _run_command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if arguments else EXIT_USAGE
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(__version__)
        return EXIT_OK
    if name not in COMMANDS:
        return print_error(f"there is no command {name!r}{suggest_name(name, list(COMMANDS))}", EXIT_USAGE)
    command = COMMANDS[name]
    if command.arguments.startswith("CONFIG"):
        if not rest or rest[0].startswith("-"):
            print(f"usage: recallax {name} CONFIG [overrides]\n\nconfigs: {', '.join(config_names())}")
            return EXIT_OK if rest and rest[0] in ("-h", "--help") else EXIT_USAGE
        check_config_name(rest[0])
    return importlib.import_module(f"recallax.cli.{command.module or name}").run(rest)
