# pyright: strict
"""Configs: JSON with a schema version, differences, and a fingerprint that names a run.

A config is a frozen, keyword-only dataclass that inherits from `Config`. tyro makes the command line from it. In JSON,
a class is named by its bare name and looked up among the imported config classes, never by an import path, so that a
file cannot run code.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAliasType, Union, cast, get_args, get_origin, get_type_hints

from recallax.schema_upgrade import downgrade, is_json_list, is_json_object, upgrade

SCHEMA_VERSION = 2
"""Version of the JSON that is written. Schema 1 is read through the table in `recallax.schema_1`."""


class Config:
    """Base class of every config; subclasses are frozen dataclasses with unique names."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class ConfigError(ValueError):
    """A config, or the file it was read from, is not valid."""


def added_field[T](default: T) -> T:
    """Declare a field that was added after configs had been saved; JSON omits it while it has its default.

    Older files can be read, and the fingerprints of older runs, log rows and checkpoints do not change.

    Args:
        default: The default, which must mean what configs without the field meant.

    Returns:
        The value to assign to the field in the class body.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def suggest_name(name: str, known: list[str]) -> str:
    """Return the end of an error message about an unknown name: `; did you mean 'x'? Known: a, b`.

    Args:
        name: The unknown name.
        known: The known names.

    Returns:
        Text that starts with `;` or `.`.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(sorted(known)) or 'none'}"


def require_at_least(minimum: int | float, owner: str = "", **values: int | float) -> None:
    """Check lower bounds of config fields.

    Args:
        minimum: The smallest value that is accepted.
        owner: Put before each name in the message, such as `train.`.
        **values: Field values by field name.

    Raises:
        ConfigError: A value is below the minimum, or NaN.
    """
    for name, value in values.items():
        if not value >= minimum:
            raise ConfigError(f"{owner}{name} is {value}; it must be at least {minimum:g}")


def to_json(config: Config, *, schema: int = SCHEMA_VERSION) -> dict[str, Any]:
    """Encode a config as JSON values.

    Args:
        config: Any config.
        schema: Version of the names to use, 1 or 2.

    Returns:
        `{"schema": schema, "class": class name, field: value, ...}`, nested for configs inside.

    Raises:
        ConfigError: A value is not plain data, or a number is not finite.
    """
    if schema not in (1, SCHEMA_VERSION):
        raise ConfigError(f"schema is {schema}; this version of recallax writes schemas 1 and {SCHEMA_VERSION}")
    encoded = _encode(config)
    return {"schema": schema, **(downgrade(encoded, _ancestry) if schema == 1 else encoded)}


def from_json[C: Config](data: Mapping[str, Any], expected: type[C]) -> C:
    """Decode what `to_json` wrote, in this or an earlier schema.

    Args:
        data: The JSON object, with its `schema`.
        expected: The config class, or a base class of it.

    Returns:
        The config.

    Raises:
        ConfigError: The schema is unknown, or a class, field or value does not fit; names its path.
    """
    version = data.get("schema")
    if version not in (1, SCHEMA_VERSION):
        raise ConfigError(f"schema is {version!r}; this version of recallax reads schemas 1 and {SCHEMA_VERSION}")
    content: Any = {k: v for k, v in data.items() if k != "schema"}
    if version == 1:
        try:
            content = upgrade(content, _ancestry)
        except ValueError as error:
            raise ConfigError(f"config of schema 1: {error}") from error
    return _decode(content, expected, "config")


def diff(old: Config, new: Config) -> list[str]:
    """Return the differences of two configs.

    Args:
        old: A config.
        new: Another config.

    Returns:
        A line `path: old -> new` for every leaf that differs; empty if the configs are equal.
    """
    a, b = dict(_leaves(to_json(old), "")), dict(_leaves(to_json(new), ""))
    missing = "(absent)"
    return [
        f"{path}: {a.get(path, missing)} -> {b.get(path, missing)}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path, missing) != b.get(path, missing)
    ]


def fingerprint(config: Config, *, schema: int = SCHEMA_VERSION) -> str:
    """Compute ten hex digits that are equal exactly when the configs are equal.

    Args:
        config: Any config.
        schema: Version of the names that are hashed. 1 gives the fingerprint that earlier versions recorded.

    Returns:
        The first ten hex digits of the SHA-256 of the canonical JSON.
    """
    text = json.dumps(to_json(config, schema=schema), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def config_classes() -> dict[str, type[Config]]:
    """Return the config classes that have been imported.

    Returns:
        Classes by name.

    Raises:
        ConfigError: Two classes have the same name.
    """
    classes: dict[str, type[Config]] = {}
    pending = list(Config.__subclasses__())
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if classes.setdefault(cls.__name__, cls) is not cls:
            raise ConfigError(f"two config classes are named {cls.__name__}; names must be unique")
    return classes


def _encode(value: Any) -> Any:
    match value:
        case Config():
            hints = get_type_hints(type(value))
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if not _is_omitted(f, value))
            # 1 and 1.0 make equal configs, so they must have one fingerprint.
            fields = {n: float(v) if hints[n] is float and type(v) is int else _encode(v) for n, v in pairs}
            return {"class": type(value).__name__, **fields}
        case Mapping():
            return {str(k): _encode(v) for k, v in cast("Mapping[Any, Any]", value).items()}
        case list() | tuple():
            return [_encode(v) for v in cast("list[Any] | tuple[Any, ...]", value)]
        case float() if not math.isfinite(value):
            raise ConfigError(f"a config contains {value}; its numbers must be finite")
        case None | bool() | int() | float() | str():
            return value
        case _:
            pass
    raise ConfigError(f"a config contains {value!r} of type {type(value).__name__}; it must be plain data")


def _decode(value: Any, hint: Any, path: str) -> Any:
    if isinstance(hint, TypeAliasType):
        return _decode(value, hint.__value__, path)
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(value, next(a for a in args if a is not type(None)), path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path} is {value!r}{suggest_name(str(value), [str(a) for a in args])}")
        return value
    if isinstance(hint, type) and issubclass(hint, Config):
        return _decode_class(value, hint, path)
    if origin is tuple and is_json_list(value):
        items = [args[0]] * len(value) if args[-1] is ... else list(args)
        if len(items) != len(value):
            raise ConfigError(f"{path} has {len(value)} items; it must have {len(items)}")
        return tuple(_decode(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, items, strict=True)))
    if origin in (dict, Mapping) and is_json_object(value):
        return {k: _decode(v, args[1], f"{path}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if not isinstance(hint, type) or type(value) is not hint:
        raise ConfigError(f"{path} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}")
    return value


def _decode_class(value: Any, expected: type[Config], path: str) -> Any:
    if not is_json_object(value) or "class" not in value:
        raise ConfigError(f"{path} is {value!r}; it must be an object with a 'class'")
    known = {name: cls for name, cls in config_classes().items() if issubclass(cls, expected) and _is_concrete(cls)}
    cls = known.get(str(value["class"]))
    if cls is None:
        raise ConfigError(f"{path} has class {value['class']!r}{suggest_name(str(value['class']), list(known))}")
    hints, data = get_type_hints(cls), {k: v for k, v in value.items() if k != "class"}
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    for key in data.keys() - fields:
        raise ConfigError(f"{path} has no field {key!r}{suggest_name(key, sorted(fields))}")
    required = {f.name for f in dataclasses.fields(cls) if f.init and _is_required(f)}
    for key in sorted(required - data.keys()):
        raise ConfigError(f"{path} lacks the field {key!r}, which {cls.__name__} must have")
    return cls(**{k: _decode(v, hints[k], f"{path}.{k}") for k, v in data.items()})


def _ancestry(name: str) -> list[str]:
    """The names of a config class and of its base classes; the name alone where no such class is imported."""
    cls = config_classes().get(name)
    return [name] if cls is None else [base.__name__ for base in cls.__mro__ if issubclass(base, Config)]


def _is_concrete(cls: type[Config]) -> bool:
    """Return True for a class that has instances, unlike a base class of configs."""
    return dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)


def _is_omitted(field: dataclasses.Field[Any], config: Config) -> bool:
    """Return True for an added field that has its default."""
    return "added" in field.metadata and getattr(config, field.name) == field.default


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if is_json_object(value):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    return [(path, json.dumps(value))]
