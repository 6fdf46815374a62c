"""Parsing of a command's options, and the options that several commands share."""

import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from recallax.cli.errors import EXIT_USAGE
from recallax.cli.outputs import check_outputs
from recallax.config_errors import ConfigError, collect_config_errors

if TYPE_CHECKING:
    from recallax.tasks import ContextRepetition


def parse_options[T](options: type[T], arguments: list[str], command: str) -> T:
    """Parse command-line arguments into an options dataclass.

    Args:
        options: A dataclass. Its docstring is the help text of the command, the docstrings of its fields those of the
            options.
        arguments: The arguments behind the command.
        command: Name of the command.

    Returns:
        The options.

    Raises:
        ConfigError: An output cannot be written.
        SystemExit: Help was requested, or an argument is wrong.
    """
    parsed = tyro.cli(options, args=arguments, prog=f"recallax {command}")
    check_outputs(parsed)
    return parsed


def parse_overrides[T](default: T, arguments: list[str], command: str) -> T:
    """Parse command-line arguments into a copy of an options dataclass that holds a config.

    Args:
        default: The options with the config as its file gives it.
        arguments: Options and overrides of the config's fields.
        command: The command and the name of the config.

    Returns:
        The options.

    Raises:
        ConfigError: Values of fields are not valid; names all of them. Or an output cannot be written.
        SystemExit: Help was requested, or options are unknown or do not have the type of their field; the reasons were
            printed.
    """
    program = f"recallax {command}"

    def parse(arguments: list[str]) -> T:
        # Without AvoidSubcommands, a field that may be None (a curriculum) would become a subcommand.
        config = (tyro.conf.AvoidSubcommands,)
        return tyro.cli(type(default), default=default, args=arguments, prog=program, config=config)

    with collect_config_errors():  # values that are not valid
        try:
            with redirect_stderr(StringIO()) as first_error:
                options = parse(arguments)
            check_outputs(options)
            return options
        except SystemExit as stop:
            if not stop.code:
                raise
            # tyro stops at the first argument that it cannot parse, so each one is parsed again alone.
            overrides = _split_overrides(arguments)
            parsed = [override for override in overrides if _is_parsed(parse, override)]
            if len(parsed) == len(overrides):
                print(first_error.getvalue(), end="", file=sys.stderr)
            else:
                parse([argument for override in parsed for argument in override])
    raise SystemExit(EXIT_USAGE)


def _split_overrides(arguments: list[str]) -> list[list[str]]:
    """Split arguments into options with their values."""
    overrides: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not overrides:
            overrides.append([])
        overrides[-1].append(argument)
    return overrides


def _is_parsed(parse: Callable[[list[str]], object], arguments: list[str]) -> bool:
    """Return whether arguments are known and have the types of their fields; prints the reason if not."""
    try:
        with collect_config_errors():
            parse(arguments)
    except SystemExit:
        return False
    except ConfigError:
        return True  # values are checked together with those of other arguments
    return True


@dataclass(frozen=True, kw_only=True)
class ContextRepetitionOptions:
    """Repetition of the context before the queries."""

    num_repeats: int = 1
    """Number of times that the context of a row is read before the queries (2 is JRT-Prompt)."""
    fill_strategy: Literal["left_pad", "twice", "iterate"] = "left_pad"
    """For contexts shorter than --prefix-length: keep (left_pad), read twice, or repeat up to that length (iterate)."""
    prefix_length: int | None = None
    """Length in tokens of the context that the run was trained with. Needed by twice and iterate."""

    def build(self) -> "ContextRepetition":
        """Return the transform of tasks and contexts that these options describe."""
        from recallax.tasks import ContextRepetition

        return ContextRepetition(
            num_repeats=self.num_repeats, fill_strategy=self.fill_strategy, prefix_length=self.prefix_length
        )


type ContextRepetitionArguments = Annotated[ContextRepetitionOptions, tyro.conf.arg(name="")]
"""The options of `ContextRepetitionOptions` without a prefix."""
