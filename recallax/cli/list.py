"""`recallax list`: list the configs."""

from dataclasses import dataclass

from recallax.cli.config_files import config_names
from recallax.cli.options import parse_options


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List the configs, each with the question that it answers."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    parse_options(ListOptions, arguments, "list")
    names = config_names()
    width = max(map(len, names))
    for name, line in names.items():
        print(f"{name:{width}}  {line}")
    return 0
