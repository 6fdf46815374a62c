"""Reading another implementation's config.json: what is asked for must be there and of the right type."""

import math
from collections.abc import Mapping
from typing import Any

from recallax.config import ConfigError

LARGEST = 2**53
"""Of whole numbers: far above any size, and a float holds all of them."""


class Fields:
    """The fields of a config.json; `model` is what errors call it, by default its `model_type`."""

    def __init__(self, values: Mapping[str, Any], model: str | None = None):
        self.values = values
        self.model: str = model or values.get("model_type", "a config without model_type")

    def get[T](self, name: str, kind: type[T], *, least: int = 1) -> T:
        """The field. Raises ConfigError where it is missing, of another type, a whole number below `least` or beyond
        any size, or not finite.
        """
        if self.values.get(name) is None:
            raise ConfigError(f"{self.model}: config.json lacks {name!r}, of type {kind.__name__}")
        return self._typed(name, self.values[name], kind, least)

    def optional[T](self, name: str, kind: type[T], default: T, *, least: int = 1) -> T:
        """The field, or where it is missing or null the default, which must be that of transformers."""
        value = self.values.get(name)
        return default if value is None else self._typed(name, value, kind, least)

    def demand(self, why: str, **wanted: Any) -> None:
        """Raise ConfigError unless the fields have these values or are missing; missing must mean the same."""
        for name, value in wanted.items():
            if self.values.get(name, value) != value:
                raise self.refusal(f"{name} is {self.values[name]!r}, and {why}; only {value!r} can be imported")

    def demand_stated(self, *names: str) -> None:
        """Raise ConfigError where a field is missing that may be null, but whose default would be a guess."""
        for name in names:
            if name not in self.values:
                raise ConfigError(f"{self.model}: config.json lacks {name!r}; write null if it has none")

    def refusal(self, reason: str) -> ConfigError:
        """The error for a model that recallax cannot represent."""
        return ConfigError(f"{self.model}: {reason}")

    def _typed[T](self, name: str, value: Any, kind: type[T], least: int) -> T:
        given = value
        if kind is float and type(value) is int and abs(value) <= LARGEST:
            value = kind(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.model}: {name} is {_shown(given)}; it must be of type {kind.__name__}")
        if isinstance(value, int) and kind is int and not least <= value <= LARGEST:
            raise ConfigError(f"{self.model}: {name} is {_shown(value)}; it must be from {least} to {LARGEST}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.model}: {name} is {value}; it must be finite")
        return value


def _shown(value: Any) -> str:
    """Short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
