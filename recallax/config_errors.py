# pyright: strict
"""Errors of configs, and the report of several independent mistakes in one error."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast


class ConfigError(ValueError):
    """A config, or the file it was read from, is not valid; the message has one line per independent mistake."""


class _ErrorCollection:
    """Messages about configs that are built one after another, and the configs that are not valid."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._invalid: list[Any] = []
        self._is_checking = False

    def validate(self, config: Any, check: Callable[[Any], None]) -> None:
        """Run the `__post_init__` of a config, unless it contains an invalid one, and collect its error."""
        if self._is_checking:
            check(config)  # called by another check, which must not continue after an error
        elif any(self._contains_invalid(getattr(config, f.name, None)) for f in dataclasses.fields(config)):
            self._invalid.append(config)
        else:
            self._is_checking = True
            try:
                check(config)
            except ConfigError as error:
                self.messages.append(str(error))
                self._invalid.append(config)
            finally:
                self._is_checking = False

    def _contains_invalid(self, value: Any) -> bool:
        match value:
            case Mapping():
                return any(map(self._contains_invalid, cast("Mapping[Any, Any]", value).values()))
            case list() | tuple():
                return any(map(self._contains_invalid, cast("list[Any] | tuple[Any, ...]", value)))
            case _ if dataclasses.is_dataclass(value):
                fields = (getattr(value, field.name, None) for field in dataclasses.fields(value))
                return any(value is other for other in self._invalid) or any(map(self._contains_invalid, fields))
            case _:
                return False


_error_collection: ContextVar[_ErrorCollection | None] = ContextVar("error_collection", default=None)


@contextmanager
def collect_config_errors() -> Generator[Callable[[str], None]]:
    """Delay the errors of configs that are built in this context to its end, so that all mistakes are reported at once.

    The check of a config is skipped if a config inside it is invalid. An invalid config must not be used.

    Yields:
        A function that adds a message.

    Raises:
        ConfigError: A config is not valid, or a message was added; the message has one line for each.
    """
    errors = _ErrorCollection()
    token = _error_collection.set(errors)
    try:
        yield errors.messages.append
    finally:
        _error_collection.reset(token)
    raise_config_errors(errors.messages)


def raise_config_errors(messages: Iterable[str]) -> None:
    """Raise an error about several mistakes, if there are any.

    Args:
        messages: A message about each mistake; equal ones are reported once.

    Raises:
        ConfigError: There is a message.
    """
    if lines := list(dict.fromkeys(messages)):
        raise ConfigError("\n".join(lines))


def run_checks(*checks: Callable[[], object]) -> None:
    """Run checks that do not depend on each other, and raise one error about all that fail.

    Args:
        *checks: Functions that raise ConfigError.

    Raises:
        ConfigError: A check fails; the message has the messages of all that fail.
    """
    messages: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            messages.append(str(error))
    raise_config_errors(messages)


def delay_error(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap the `__post_init__` of a config such that `collect_config_errors` can delay its error.

    Args:
        check: The method.

    Returns:
        A method that raises the same error outside of such a context.
    """

    @functools.wraps(check)
    def validate(self: Any) -> None:
        errors = _error_collection.get()
        if errors is None:
            check(self)
        else:
            errors.validate(self, check)

    return validate
