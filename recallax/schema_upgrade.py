# pyright: strict
"""Translation of configs between schema 1 and the names in use now, by the tables in `recallax.schema_1`."""

from collections.abc import Callable
from typing import Any, TypeGuard

from recallax.schema_1 import CLASSES, FIELDS, VALUES

type Ancestry = Callable[[str], list[str]]
"""The names of a config class and of its base classes, by its name."""


def is_json_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Return True for a decoded JSON object."""
    return isinstance(value, dict)


def is_json_list(value: Any) -> TypeGuard[list[Any]]:
    """Return True for a decoded JSON array."""
    return isinstance(value, list)


def upgrade(value: Any, ancestry: Ancestry) -> Any:
    """Translate JSON of schema 1 into the names in use now.

    Args:
        value: A decoded JSON value: an object with a `class`, or a list or leaf inside one.
        ancestry: Returns the names of a config class and its bases. Fields that a class inherits are renamed with
            their base class.

    Returns:
        A new value of the same structure. Unknown classes and fields are kept as they are.

    Raises:
        ValueError: A value has no counterpart, such as a `max_beta` other than 1 and 2.
    """

    def rename(config: dict[str, Any]) -> dict[str, Any]:
        old_name: str = config["class"]
        name = CLASSES.get(old_name, old_name)
        fields, values = _renamed_fields(name, ancestry), _renamed_values(name, ancestry)
        renamed: dict[str, Any] = {"class": name}
        for key, item in config.items():
            new = fields.get(key, key)
            if key != "class":
                renamed[new] = _translate(f"{old_name}.{key}", item, values.get(new))
        return renamed

    return _map_configs(value, rename)


def downgrade(value: Any, ancestry: Ancestry) -> Any:
    """Translate JSON in the names in use now into schema 1.

    Args:
        value: A decoded JSON value.
        ancestry: Returns the names of a config class and its bases.

    Returns:
        A new value of the same structure; `upgrade` is the inverse.
    """

    def rename(config: dict[str, Any]) -> dict[str, Any]:
        name: str = config["class"]
        fields = {new: old for old, new in _renamed_fields(name, ancestry).items()}
        values = _renamed_values(name, ancestry)
        renamed: dict[str, Any] = {}
        for key, item in config.items():
            table = {new: old for old, new in values.get(key, {}).items()}
            renamed[fields.get(key, key)] = _translate(key, item, table or None)
        return renamed | {"class": next((old for old, new in CLASSES.items() if new == name), name)}

    return _map_configs(value, rename)


def _map_configs(value: Any, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Apply a function to every object with a `class`, innermost first."""
    if is_json_list(value):
        return [_map_configs(item, rename) for item in value]
    if not is_json_object(value):
        return value
    mapped = {key: _map_configs(item, rename) for key, item in value.items()}
    return rename(mapped) if "class" in mapped else mapped


def _renamed_fields(name: str, ancestry: Ancestry) -> dict[str, str]:
    return {old: new for base in reversed(ancestry(name)) for old, new in FIELDS.get(base, {}).items()}


def _renamed_values(name: str, ancestry: Ancestry) -> dict[str, dict[Any, Any]]:
    bases = set(ancestry(name))
    return {field: table for (base, field), table in VALUES.items() if base in bases}


def _translate(field: str, value: Any, table: dict[Any, Any] | None) -> Any:
    """Look up a value in a table; numbers must be in it, and other values are kept if they are not."""
    if table is None or is_json_list(value) or is_json_object(value):
        return value
    if value in table:
        return table[value]
    if all(isinstance(key, float) for key in table):
        raise ValueError(
            f"{field} is {value}, which this version does not support; the supported values of schema 1 are "
            f"{' and '.join(f'{key:g}' for key in table)}"
        )
    return value
