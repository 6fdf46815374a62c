"""`recallax doctor`: print what this machine has, and the implementations that each op selects on it."""

from dataclasses import dataclass

from recallax.cli.options import parse_options


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Print versions, devices, extras, and the implementations that each op selects on this machine."""


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    parse_options(DoctorOptions, arguments, "doctor")
    from recallax.cli.machine import describe_machine

    print(describe_machine())
    return 0
