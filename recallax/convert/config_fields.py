"""Checked access to the fields of another implementation's config.json."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from recallax.config import ConfigError, suggest_name
from recallax.external_file import short_repr
from recallax.models.pattern import MAX_LAYERS

MAX_INT = 2**53
"""Largest accepted integer: far above any size, and exact in a float64."""


class ConfigFields:
    """The fields of a config.json, with checks of presence, type and range.

    Every access marks a field as read. `reject_unread` then rejects the fields that the import has not read, since they
    may change what the model computes.

    Args:
        values: The parsed JSON object.
        model_name: The model's name in error messages. None: its `model_type`.
    """

    def __init__(self, values: Mapping[str, Any], model_name: str | None = None):
        self.values = values
        self.model_name: str = model_name or values.get("model_type", "a config without model_type")
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field without a check.

        Args:
            name: The field's name.
            default: The value where the field is missing.

        Returns:
            The value as parsed, or the default.
        """
        self.read.add(name)
        return self.values.get(name, default)

    def required[T](
        self, name: str, expected_type: type[T], *, minimum: int = 1, maximum: int = MAX_INT, above: float = -math.inf
    ) -> T:
        """Return a field that must be present.

        Args:
            name: The field's name.
            expected_type: Its type. Integers are accepted as floats.
            minimum: Smallest accepted integer.
            maximum: Largest accepted integer.
            above: Exclusive lower bound of floats.

        Returns:
            The value.

        Raises:
            ConfigError: If the field is missing, null, of another type, out of range or not finite.
        """
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{self.model_name}: config.json lacks {name!r}, of type {expected_type.__name__}")
        return self._check_type(name, value, expected_type, (minimum, maximum), above)

    def optional[T](
        self, name: str, expected_type: type[T], default: T, *, minimum: int = 1, above: float = -math.inf
    ) -> T:
        """Return a field that may be missing.

        Args:
            name: The field's name.
            expected_type: Its type. Integers are accepted as floats.
            default: The value where the field is missing or null; it must be the source implementation's default.
            minimum: Smallest accepted integer.
            above: Exclusive lower bound of floats.

        Returns:
            The value, or the default.

        Raises:
            ConfigError: If the field is of another type, out of range or not finite.
        """
        value = self.get(name)
        return default if value is None else self._check_type(name, value, expected_type, (minimum, MAX_INT), above)

    def num_layers(self, name: str) -> int:
        """Return a required number of layers.

        Args:
            name: The field's name.

        Returns:
            The number, from 1 to `MAX_LAYERS`.

        Raises:
            ConfigError: If the field is missing, of another type or out of range.
        """
        return self.required(name, int, maximum=MAX_LAYERS)

    def layer_types(
        self, name: str, supported: Iterable[str], unsupported: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return a required list with the type of each layer.

        Args:
            name: The field's name.
            supported: The types that can be imported.
            unsupported: The reason in the error message, by type that the source implementation has and recallax lacks.

        Returns:
            At least one type, and as many as `num_hidden_layers` where this field is present.

        Raises:
            ConfigError: If the field is no such list.
        """
        types, known = self.required(name, list), list(supported)
        for layer, layer_type in enumerate(types):
            if isinstance(layer_type, str) and layer_type in (unsupported or {}):
                raise self.unsupported(f"{name} contains {layer_type!r}, {(unsupported or {})[layer_type]}")
            if layer_type not in known:
                raise self.unsupported(
                    f"{name} contains {short_repr(layer_type)} as layer {layer}, which recallax does not support"
                    f"{suggest_name(str(layer_type)[:MAX_LAYERS], known)}"
                )
        if not 1 <= len(types) <= MAX_LAYERS:
            raise self.unsupported(f"{name} has {len(types)} layers; it must have from 1 to {MAX_LAYERS}")
        stated = self.get("num_hidden_layers")
        if stated is not None and self.num_layers("num_hidden_layers") != len(types):
            raise self.unsupported(f"num_hidden_layers is {stated}, but {name} has {len(types)} layers; correct one")
        return types

    def layer_numbers(self, name: str, num_layers: int) -> list[int]:
        """Return a list of layers, which may be missing.

        Args:
            name: The field's name.
            num_layers: The number of layers of the model.

        Returns:
            Numbers from 0 to `num_layers - 1`; none where the field is missing.

        Raises:
            ConfigError: If the field is no such list.
        """
        numbers = self.optional(name, list, [])
        for number in numbers:
            if type(number) is not int or not 0 <= number < num_layers:
                raise self.unsupported(
                    f"{name} contains {short_repr(number)}; it must be a layer, from 0 to {num_layers - 1}"
                )
        return numbers

    def require_values(self, reason: str, **expected: Any) -> None:
        """Check fields of which recallax supports one value, which must also be the source implementation's default.

        Args:
            reason: The reason in the error message: a statement about recallax or the model.
            **expected: The supported value of each field.

        Raises:
            ConfigError: If a field is present with another value.
        """
        for name, value in expected.items():
            if (stated := self.get(name, value)) != value:
                raise self.unsupported(f"{name} is {short_repr(stated)}, and {reason}; only {value!r} can be imported")

    def require_derived(self, **expected: int) -> None:
        """Check fields that the source implementation computes from others, and that recallax does not need.

        Args:
            **expected: The value that follows from the other fields.

        Raises:
            ConfigError: If a field is present with another value.
        """
        for name, value in expected.items():
            if self.get(name) not in (None, value):
                raise self.unsupported(
                    f"{name} is {short_repr(self.get(name))}, but the other fields require {value}; correct one of them"
                )

    def require_multiple(self, name: str, value: int, divisor_name: str, divisor: int) -> None:
        """Check that one number is a multiple of another.

        Args:
            name: The field of the number.
            value: The number.
            divisor_name: The field of the other number.
            divisor: The other number.

        Raises:
            ConfigError: If there is a remainder.
        """
        if value % divisor:
            raise self.unsupported(f"{divisor_name} is {divisor}; {name} {value} must be a multiple of it")

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

    def reject_unread(self, ignored: Iterable[str] = ()) -> None:
        """Reject the fields that were not read and are not null.

        Args:
            ignored: Fields that do not change what the model computes.

        Raises:
            ConfigError: If there is such a field; the message names the first one.
        """
        accepted = self.read.union(ignored)
        for name, value in self.values.items():
            if name not in accepted and value is not None:
                raise self.unsupported(
                    f"recallax does not know the field {short_repr(name)}, which is {short_repr(value)}, and it may "
                    "change what the model computes; remove it from config.json if it does not"
                )

    def unsupported(self, reason: str) -> ConfigError:
        """Return the error for a model that recallax cannot represent.

        Args:
            reason: The rest of the message, after the model's name.

        Returns:
            The error, to be raised by the caller.
        """
        return ConfigError(f"{self.model_name}: {reason}")

    def _check_type[T](self, name: str, value: Any, expected_type: type[T], limits: tuple[int, int], above: float) -> T:
        original = value
        if expected_type is float and type(value) is int and abs(value) <= MAX_INT:
            value = float(value)
        if type(value) is not expected_type:
            raise self.unsupported(f"{name} is {short_repr(original)}; it must be of type {expected_type.__name__}")
        number: Any = value
        if expected_type is int and not limits[0] <= number <= limits[1]:
            raise self.unsupported(f"{name} is {short_repr(value)}; it must be from {limits[0]} to {limits[1]}")
        if expected_type is float and not math.isfinite(number):
            raise self.unsupported(f"{name} is {value}; it must be finite")
        if expected_type is float and not number > above:
            raise self.unsupported(f"{name} is {value}; it must be above {above:g}")
        return value
