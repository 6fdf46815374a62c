"""Reading another implementation's config.json: what is asked for must be there and of the right type."""

import math
from collections.abc import Mapping
from typing import Any

from recallax.config import ConfigError

MAX_INT = 2**53
"""Of whole numbers: far above any size, and a float holds all of them."""


class ConfigFields:
    """The fields of a config.json; `model_name` is what errors call it, by default its `model_type`."""

    def __init__(self, values: Mapping[str, Any], model_name: str | None = None):
        self.values = values
        self.model_name: str = model_name or values.get("model_type", "a config without model_type")

    def required[T](self, name: str, expected_type: type[T], *, minimum: int = 1) -> T:
        """The field. Raises ConfigError where it is missing, of another type, a whole number below `minimum` or beyond
        any size, or not finite.
        """
        if self.values.get(name) is None:
            raise ConfigError(f"{self.model_name}: config.json lacks {name!r}, of type {expected_type.__name__}")
        return self._check_type(name, self.values[name], expected_type, minimum)

    def optional[T](self, name: str, expected_type: type[T], default: T, *, minimum: int = 1) -> T:
        """The field, or where it is missing or null the default, which must be that of transformers."""
        value = self.values.get(name)
        return default if value is None else self._check_type(name, value, expected_type, minimum)

    def require_values(self, reason: str, **expected: Any) -> None:
        """Raise ConfigError unless the fields have these values or are missing; missing must mean the same."""
        for name, value in expected.items():
            if self.values.get(name, value) != value:
                raise self.unsupported(f"{name} is {self.values[name]!r}, and {reason}; only {value!r} can be imported")

    def require_present(self, *names: str) -> None:
        """Raise ConfigError where a field is missing that may be null, but whose default would be a guess."""
        for name in names:
            if name not in self.values:
                raise ConfigError(f"{self.model_name}: config.json lacks {name!r}; write null if it has none")

    def unsupported(self, reason: str) -> ConfigError:
        """The error for a model that recallax cannot represent."""
        return ConfigError(f"{self.model_name}: {reason}")

    def _check_type[T](self, name: str, value: Any, expected_type: type[T], minimum: int) -> T:
        given = value
        if expected_type is float and type(value) is int and abs(value) <= MAX_INT:
            value = expected_type(value)
        if type(value) is not expected_type:
            raise ConfigError(
                f"{self.model_name}: {name} is {_short_repr(given)}; it must be of type {expected_type.__name__}"
            )
        if isinstance(value, int) and expected_type is int and not minimum <= value <= MAX_INT:
            raise ConfigError(
                f"{self.model_name}: {name} is {_short_repr(value)}; it must be from {minimum} to {MAX_INT}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.model_name}: {name} is {value}; it must be finite")
        return value


def _short_repr(value: Any) -> str:
    """Short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
