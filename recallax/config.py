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
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAliasType, Union, cast, get_args, get_origin, get_type_hints

from recallax.config_errors import ConfigError, collect_config_errors, delay_error, raise_config_errors
from recallax.external_file import MAX_JSON_DEPTH, MAX_REPR_LENGTH, short_repr
from recallax.schema_upgrade import downgrade, is_json_list, is_json_object, upgrade

SCHEMA_VERSION = 2
"""Version of the JSON that is written. Schema 1 is read through the table in `recallax.schema_1`."""


class Config:
    """Base class of every config; subclasses are frozen dataclasses with unique names."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__post_init__" in vars(cls):
            cls.__post_init__ = delay_error(vars(cls)["__post_init__"])


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

    Examples:
        >>> suggest_name("widow", ["window", "based"])
        "; did you mean 'window'? Known: based, window"
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(sorted(known)) or 'none'}"


def require_at_least(
    minimum: int | float, owner: str = "", alternative: str = "", /, **values: int | float | None
) -> None:
    """Check lower bounds of config fields and arguments; the message names all values that are too small.

    Args:
        minimum: The smallest value that is accepted.
        owner: Put before each name in the message, such as `train.`.
        alternative: Put after the rule in the message, such as `or None for all ids`.
        **values: Values by name. None, the value of an optional field that is not set, is accepted.

    Raises:
        ConfigError: A value is below the minimum, or NaN.
    """
    rule = f"at least {minimum:g}" + (f", {alternative}" if alternative else "")
    too_small = {name: value for name, value in values.items() if value is not None and not value >= minimum}
    raise_config_errors(f"{owner}{name} is {value}; it must be {rule}" for name, value in too_small.items())


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
        ConfigError: The schema is unknown, or classes, fields or values do not fit; names the path of each.
    """
    if _depth_exceeds(data, MAX_JSON_DEPTH):
        raise ConfigError(f"config is nested too deep; it may have at most {MAX_JSON_DEPTH} levels")
    version = data.get("schema")
    if version not in (1, SCHEMA_VERSION):
        raise ConfigError(
            f"schema is {short_repr(version)}; this version of recallax reads schemas 1 and {SCHEMA_VERSION}"
        )
    content: Any = {k: v for k, v in data.items() if k != "schema"}
    if version == 1:
        try:
            content = upgrade(content, _ancestry)
        except ValueError as error:
            raise ConfigError(f"config of schema 1: {error}") from error
    with collect_config_errors() as add_error:
        config = _Decoder(add_error).decode(content, expected, "config")
    return config


def diff(old: Config, new: Config) -> list[str]:
    """Return the differences of two configs.

    Args:
        old: A config.
        new: Another config.

    Returns:
        A line `path: old -> new` for every leaf that differs; empty if the configs are equal.

    Examples:
        >>> from recallax.layers import SlidingWindow
        >>> diff(SlidingWindow(window=64), SlidingWindow(window=128))
        ['window: 64 -> 128']
    """
    return _diff_leaves(to_json(old), to_json(new))


def diff_json(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences of two encoded configs, which may have different schemas.

    Configs of another version of recallax, or of classes that are not imported, are compared as they are encoded.

    Args:
        old: What `to_json` returned for a config.
        new: The same for another config.

    Returns:
        A line `path: old -> new` for every leaf that differs; empty if the configs are equal.
    """
    if old == new:
        return []
    try:
        return diff(from_json(old, Config), from_json(new, Config))
    except ConfigError:
        return _diff_leaves(old, new)


def fingerprint(config: Config, *, schema: int = SCHEMA_VERSION) -> str:
    """Compute ten hex digits that are equal exactly when the configs are equal.

    Args:
        config: Any config.
        schema: Version of the names that are hashed. 1 gives the fingerprint that earlier versions recorded.

    Returns:
        The first ten hex digits of the SHA-256 of the canonical JSON.

    Examples:
        >>> from recallax.layers import SlidingWindow
        >>> fingerprint(SlidingWindow(window=64)) == fingerprint(SlidingWindow(window=64, num_heads=1))
        True
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


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Return whether JSON values are nested deeper than a limit, without a recursion of that depth."""
    level = [value]
    for _ in range(limit):
        children = (v.values() if is_json_object(v) else v for v in level if is_json_object(v) or is_json_list(v))
        level = [child for group in children for child in group]
    return bool(level)


class _Decoder:
    """Decoding of JSON values by the types of config fields; what does not fit is reported and becomes `_INVALID`."""

    def __init__(self, add_error: Callable[[str], None]):
        self._add_error = add_error

    def decode(self, value: Any, hint: Any, path: str) -> Any:
        """Decode a value of the type `hint`."""
        if isinstance(hint, TypeAliasType):
            return self.decode(value, hint.__value__, path)
        origin, args = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if origin in (Union, types.UnionType):
            if value is None and type(None) in args:
                return None
            return self.decode(value, next(a for a in args if a is not type(None)), path)
        if origin is Literal:
            if value in args:
                return value
            return self._reject(f"{path} is {short_repr(value)}{_suggest(value, [str(a) for a in args])}")
        if isinstance(hint, type) and issubclass(hint, Config):
            return self._decode_class(value, hint, path)
        if origin is tuple and is_json_list(value):
            items = [args[0]] * len(value) if args[-1] is ... else list(args)
            if len(items) != len(value):
                return self._reject(f"{path} has {len(value)} items; it must have {len(items)}")
            pairs = enumerate(zip(value, items, strict=True))
            return _whole(tuple(self.decode(v, h, f"{path}[{i}]") for i, (v, h) in pairs))
        if origin in (dict, Mapping) and is_json_object(value):
            return _whole({k: self.decode(v, args[1], f"{path}.{k}") for k, v in value.items()})
        if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        if isinstance(hint, type) and type(value) is hint:
            return value
        return self._reject(f"{path} is {short_repr(value)}; it must be of type {getattr(hint, '__name__', hint)}")

    def _decode_class(self, value: Any, expected: type[Config], path: str) -> Any:
        if not is_json_object(value) or "class" not in value:
            return self._reject(f"{path} is {short_repr(value)}; it must be an object with a 'class'")
        known = {name: cls for name, cls in config_classes().items() if issubclass(cls, expected) and _is_concrete(cls)}
        cls = known.get(str(value["class"]))
        if cls is None:
            name = value["class"]
            return self._reject(f"{path} has class {short_repr(name)}{_suggest(name, list(known))}")
        hints, data = get_type_hints(cls), {k: v for k, v in value.items() if k != "class"}
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
        unknown = [key for key in data if key not in fields]
        missing = [key for key, field in fields.items() if key not in data and _is_required(field)]
        for key in unknown:
            self._add_error(f"{path} has no field {short_repr(key)}{_suggest(key, sorted(fields))}")
        for key in missing:
            self._add_error(f"{path} lacks the field {key!r}, which {cls.__name__} must have")
        values = _whole({k: self.decode(v, hints[k], f"{path}.{k}") for k, v in data.items() if k in fields})
        return _INVALID if unknown or missing or values is _INVALID else cls(**values)

    def _reject(self, message: str) -> Any:
        self._add_error(message)
        return _INVALID


_INVALID = object()
"""Stands for a value that could not be decoded."""


def _whole(values: dict[str, Any] | tuple[Any, ...]) -> Any:
    """Return decoded values, a tuple or a dict; `_INVALID` if any of them could not be decoded."""
    items = values.values() if isinstance(values, dict) else values
    return _INVALID if any(item is _INVALID for item in items) else values


def _suggest(value: Any, known: list[str]) -> str:
    return suggest_name(str(value)[:MAX_REPR_LENGTH], known)


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


def _diff_leaves(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    a, b = dict(_leaves(old, "")), dict(_leaves(new, ""))
    missing = "(absent)"
    return [
        f"{path}: {a.get(path, missing)} -> {b.get(path, missing)}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path, missing) != b.get(path, missing)
    ]


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if is_json_object(value):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    return [(path, json.dumps(value))]
