"""Checked access to the fields of another implementation's config.json."""

import math
from collections.abc import Mapping
from typing import Any

from recallax.config import ConfigError

MAX_INT = 2**53
"""Largest accepted integer: far above any size, and exact in a float64."""
MAX_REPR_LENGTH = 80
"""Characters of a value in an error message."""


class ConfigFields:
    """The fields of a config.json, with checks of presence, type and range.

    Args:
        values: The parsed JSON object.
        model_name: The model's name in error messages. None: its `model_type`.
    """

    def __init__(self, values: Mapping[str, Any], model_name: str | None = None):
        self.values = values
        self.model_name: str = model_name or values.get("model_type", "a config without model_type")

    def required[T](self, name: str, expected_type: type[T], *, minimum: int = 1) -> T:
        """Return a field that must be present.

        Args:
            name: The field's name.
            expected_type: Its type. Integers are accepted as floats.
            minimum: Smallest accepted integer.

        Returns:
            The value.

        Raises:
            ConfigError: If the field is missing, null, of another type, out of range or not finite.
        """
        if self.values.get(name) is None:
            raise ConfigError(f"{self.model_name}: config.json lacks {name!r}, of type {expected_type.__name__}")
        return self._check_type(name, self.values[name], expected_type, minimum)

    def optional[T](self, name: str, expected_type: type[T], default: T, *, minimum: int = 1) -> T:
        """Return a field that may be missing.

        Args:
            name: The field's name.
            expected_type: Its type. Integers are accepted as floats.
            default: The value where the field is missing or null; it must be the source implementation's default.
            minimum: Smallest accepted integer.

        Returns:
            The value, or the default.

        Raises:
            ConfigError: If the field is of another type, out of range or not finite.
        """
        value = self.values.get(name)
        return default if value is None else self._check_type(name, value, expected_type, minimum)

    def require_values(self, reason: str, **expected: Any) -> None:
        """Check fields of which recallax supports one value, which must also be the source implementation's default.

        Args:
            reason: The reason in the error message: a statement about recallax or the model.
            **expected: The supported value of each field.

        Raises:
            ConfigError: If a field is present with another value.
        """
        for name, value in expected.items():
            if self.values.get(name, value) != value:
                raise self.unsupported(f"{name} is {self.values[name]!r}, and {reason}; only {value!r} can be imported")

    def require_present(self, *names: str) -> None:
        """Check that fields are present, which may be null but whose default would be a guess.

        Args:
            *names: The fields' names.

        Raises:
            ConfigError: If a field is missing.
        """
        for name in names:
            if name not in self.values:
                raise ConfigError(f"{self.model_name}: config.json lacks {name!r}; write null if it has none")

    def unsupported(self, reason: str) -> ConfigError:
        """Return the error for a model that recallax cannot represent.

        Args:
            reason: The rest of the message, after the model's name.

        Returns:
            The error, to be raised by the caller.
        """
        return ConfigError(f"{self.model_name}: {reason}")

    def _check_type[T](self, name: str, value: Any, expected_type: type[T], minimum: int) -> T:
        original = value
        if expected_type is float and type(value) is int and abs(value) <= MAX_INT:
            value = expected_type(value)
        if type(value) is not expected_type:
            raise ConfigError(
                f"{self.model_name}: {name} is {_short_repr(original)}; it must be of type {expected_type.__name__}"
            )
        if isinstance(value, int) and expected_type is int and not minimum <= value <= MAX_INT:
            raise ConfigError(
                f"{self.model_name}: {name} is {_short_repr(value)}; it must be from {minimum} to {MAX_INT}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.model_name}: {name} is {value}; it must be finite")
        return value


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_REPR_LENGTH else f"{text[: MAX_REPR_LENGTH - 3]}..."
