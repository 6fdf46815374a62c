"""Parsing of a command's options, and the options that several commands share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

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
        SystemExit: Help was requested, or an argument is wrong.
    """
    return tyro.cli(options, args=arguments, prog=f"recallax {command}")


def parse_overrides[T](default: T, arguments: list[str], command: str) -> T:
    """Parse command-line arguments into a copy of an options dataclass that holds a config.

    Args:
        default: The options with the config as its file gives it.
        arguments: Options and overrides of the config's fields.
        command: The command and the name of the config.

    Returns:
        The options.

    Raises:
        SystemExit: Help was requested, or an argument is wrong.
    """
    # Without AvoidSubcommands, a field that may be None (a curriculum) would become a subcommand.
    config = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(type(default), default=default, args=arguments, prog=f"recallax {command}", config=config)


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
