"""Configs: JSON round trip, fingerprints, differences, and errors that name the path of a wrong field."""

import copy
import gc
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from recallax.cli.config_files import config_names
from recallax.config import (
    SCHEMA_VERSION,
    Config,
    ConfigError,
    added_field,
    config_classes,
    diff,
    fingerprint,
    from_json,
    require_at_least,
    to_json,
)
from recallax.config_errors import collect_config_errors
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train

NAMES = list(config_names())


def config(name: str = "mqar_micro") -> RunConfig:
    return importlib.import_module(f"recallax.configs.{name}").get_config()


@pytest.mark.parametrize("form", ["get_config", "get_tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str, form: str) -> None:
    value = getattr(importlib.import_module(f"recallax.configs.{name}"), form)()
    text = json.dumps(to_json(value), allow_nan=False)
    back = from_json(json.loads(text), RunConfig)
    assert back == value and type(back) is type(value)
    assert json.dumps(to_json(back)) == text
    assert fingerprint(back) == fingerprint(value) and diff(back, value) == []


def test_no_two_configs_share_a_fingerprint() -> None:
    modules = [importlib.import_module(f"recallax.configs.{name}") for name in NAMES]
    prints = [fingerprint(form()) for module in modules for form in (module.get_config, module.get_tiny)]
    assert len(set(prints)) == len(prints)


def test_fingerprint_is_stable_and_independent_of_order() -> None:
    data = to_json(config())
    data["model"]["blocks"] = dict(reversed(data["model"]["blocks"].items()))
    assert fingerprint(from_json(data, RunConfig)) == fingerprint(config())
    # These values change only with the schema or a field of AdamW.
    assert fingerprint(AdamW(lr=0.5)) == "e3665daba1" and fingerprint(AdamW(lr=0.5), schema=1) == "4dba6872fa"


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if not isinstance(value, dict | list):
        yield path
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, (*path, key))


def changed(data: dict, path: tuple) -> RunConfig | None:
    """Return the config with the first valid other value at one leaf, or None."""
    old = data
    for key in path:
        old = old[key]
    others = [old * 2, old + 2, old / 2, old + 1] if isinstance(old, int | float) else ["zoology", "bfloat16", "block"]
    for other in others:
        new = copy.deepcopy(data)
        target = new
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = type(old)(other) if isinstance(old, int | float) else other
        try:
            value = from_json(new, RunConfig)
        except ConfigError:
            continue
        if value != from_json(data, RunConfig):
            return value
    return None


def test_every_changed_leaf_changes_the_fingerprint() -> None:
    data = to_json(config())
    changes = {path: changed(data, path) for path in leaves(data) if path[-1] not in ("schema", "class")}
    valid = {path: value for path, value in changes.items() if value is not None}
    assert len(valid) > 30  # without leaves that may be None, and the pattern
    assert len({fingerprint(value) for value in (config(), *valid.values())}) == len(valid) + 1
    for path, value in valid.items():
        (line,) = diff(config(), value)
        keys = [key for key in path if isinstance(key, str)]
        assert line.startswith(".".join(keys[:2])) and " -> " in line


def test_equal_numbers_have_equal_fingerprints() -> None:
    # A config file may contain an integer. The constructor rejects it in tests, which check types.
    whole, fraction = AdamW(lr=2.0), AdamW(lr=1.0)
    object.__setattr__(whole, "lr", 1)
    assert whole == fraction and fingerprint(whole) == fingerprint(fraction) and diff(whole, fraction) == []
    assert diff(fraction, AdamW(lr=2.0)) == ["lr: 1.0 -> 2.0"]


def test_diff_shows_fields_of_one_side() -> None:
    assert diff(Train(), Train(loss_weights={"a": 0.5})) == ["loss_weights.a: (absent) -> 0.5"]
    other = config("mqar_attention").model.blocks["mixer"].mixer
    assert 'class: "AdamW" -> "Attention"' in diff(AdamW(), other)


def edit(*path: Any, to: Any) -> dict:
    data = to_json(config())
    target: Any = data
    for key in path[:-1]:
        target = target[key]
    if to is None:
        del target[path[-1]]
    else:
        target[path[-1]] = to
    return json.loads(json.dumps(data))


MIXER = ("model", "blocks", "mixer", "mixer")
INVALID_CONFIGS = {
    "unknown field": (edit("optim", "lrr", to=1.0), ["config.optim", "'lrr'", "did you mean 'lr'"]),
    "unknown class": (edit(*MIXER, "class", to="Basd"), ["config.model.blocks.mixer.mixer", "did you mean 'Based'"]),
    "class of another kind": (edit(*MIXER, "class", to="AdamW"), ["'AdamW'", "Based"]),
    "no class": (edit(*MIXER, "class", to=None), ["config.model.blocks.mixer.mixer", "'class'"]),
    "not an object": (edit("optim", to=3), ["config.optim is 3", "object"]),
    "missing field": (edit("model", "d_model", to=None), ["config.model", "'d_model'", "LMConfig"]),
    "text for a number": (edit("optim", "lr", to="3e-3"), ["config.optim.lr is '3e-3'", "float"]),
    "fraction for a count": (edit("train", "steps", to=2.5), ["config.train.steps is 2.5", "int"]),
    "truth for a number": (edit("optim", "lr", to=True), ["config.optim.lr is True", "float"]),
    "truth for a count": (edit("train", "steps", to=True), ["config.train.steps is True", "int"]),
    "a number beyond floats": (edit("optim", "lr", to=10**400), ["config.optim.lr", "float"]),
    "list for an object": (edit("model", "blocks", to=[1]), ["config.model.blocks is [1]", "dict"]),
    "unknown choice": (
        edit("model", "compute_dtype", to="bfloat61"),
        ["config.model.compute_dtype", "did you mean 'bfloat16'"],
    ),
    "broken rule": (edit("train", "steps", to=0), ["train.steps is 0", "at least 1"]),
    "other schema": (
        edit("schema", to=SCHEMA_VERSION + 1),
        [f"schema is {SCHEMA_VERSION + 1}", f"reads schemas 1 and {SCHEMA_VERSION}"],
    ),
    "no schema": (edit("schema", to=None), ["schema is None"]),
}


@pytest.mark.fault("S5")
@pytest.mark.parametrize("case", INVALID_CONFIGS)
def test_errors_name_the_path(case: str) -> None:
    data, parts = INVALID_CONFIGS[case]
    with pytest.raises(ConfigError) as error:
        from_json(data, RunConfig)
    for part in parts:
        assert part in str(error.value)


def test_independent_mistakes_are_reported_together() -> None:
    data = edit(*MIXER, "class", to="Basd")
    data["optim"] |= {"lrr": 1.0, "b1": 2.0, "momentum": 0.5}
    data["train"] |= {"steps": 0, "batch_size": "8", "seed": -1}
    data["evaluate"] |= {"every": 0, "batches": -1}
    data["model"] |= {"d_model": None, "soft_cap": "high"}
    del data["model"]["pattern"]
    with pytest.raises(ConfigError) as error:
        from_json(data, RunConfig)
    lines = str(error.value).split("\n")
    starts = [
        "config.model lacks the field 'pattern'",
        "config.model.d_model is None; it must be of type int",
        "config.model.blocks.mixer.mixer has class 'Basd'; did you mean 'Based'",
        "config.model.soft_cap is 'high'; it must be of type float",
        "config.optim has no field 'lrr'; did you mean 'lr'",
        "config.optim has no field 'momentum'",
        "config.train.batch_size is '8'; it must be of type int",
        "evaluate.every is 0; it must be at least 1",
        "evaluate.batches is -1; it must be at least 1",
    ]
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert len(lines) == len(starts)  # values of a class with a wrong field are not checked


def test_values_out_of_range_are_reported_together_without_consequences() -> None:
    """Checks of a config are skipped if a config inside it is invalid: their result would be a consequence."""
    data = to_json(config())
    data["optim"] |= {"lr": -1.0, "b1": 2.0, "warmup_ratio": 5.0}
    data["train"] |= {"steps": 0, "seed": -1}
    data["model"] |= {"pattern": "mixr", "dropout": 1.0, "d_model": 0}
    with pytest.raises(ConfigError) as error:
        from_json(data, RunConfig)
    names = [line.split(" ")[0] for line in str(error.value).split("\n")]
    assert sorted(names) == sorted(
        ["optim.lr", "optim.b1", "optim.warmup_ratio", "train.steps", "train.seed", "pattern", "d_model", "dropout"]
    )
    with pytest.raises(ConfigError, match=r"^optim\.lr is -1\.0; it must be at least 0 and finite$"):
        AdamW(lr=-1.0)  # outside of the context, the class itself raises


def test_collected_errors_do_not_hide_other_errors() -> None:
    @dataclass(frozen=True, kw_only=True)
    class InnerOfTest(Config):
        size: int

        def __post_init__(self) -> None:
            require_at_least(1, size=self.size)

    @dataclass(frozen=True, kw_only=True)
    class DerivedOfTest(InnerOfTest):
        total: int = 6

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.total % self.size:  # not reached for an invalid size
                raise ConfigError(f"total is {self.total}; it must be a multiple of size {self.size}")

    @dataclass(frozen=True, kw_only=True)
    class OuterOfTest(Config):
        inner: tuple[InnerOfTest, ...]
        divisor: int = 1

        def __post_init__(self) -> None:
            if any(self.divisor % inner.size for inner in self.inner):
                raise ConfigError(f"divisor is {self.divisor}; it must be a multiple of each size")

    with pytest.raises(ConfigError) as error, collect_config_errors() as add_error:
        OuterOfTest(inner=(DerivedOfTest(size=0), DerivedOfTest(size=4)))
        OuterOfTest(inner=(InnerOfTest(size=2),))
        add_error("another mistake")
    expected = [
        "size is 0; it must be at least 1",
        "total is 6; it must be a multiple of size 4",
        "divisor is 1; it must be a multiple of each size",
        "another mistake",
    ]
    assert str(error.value).split("\n") == expected
    with pytest.raises(KeyError), collect_config_errors() as add_error:
        add_error("a mistake before a defect")
        raise KeyError


HOSTILE = [
    "os.system",
    "builtins.eval",
    "__class__",
    "Config",
    "MixerConfig",
    "Task",
    "../x",
    "",
    5,
    None,
    ["MQAR"],
    {},
]


@pytest.mark.fault("S5")
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("expected", [RunConfig, Config])
def test_only_concrete_configs_are_decoded(name: Any, expected: type[Config]) -> None:
    with pytest.raises(ConfigError, match="has class"):
        from_json({"schema": SCHEMA_VERSION, "class": name}, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_rejected(value: float) -> None:
    with pytest.raises(ConfigError, match=str(value)):
        fingerprint(Train(loss_weights={"next_token": value}))
    with pytest.raises(ConfigError, match=r"optim\.lr is"):
        AdamW(lr=value)


COUNTS = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "save_every", "max_to_keep", "fsdp")


@pytest.mark.parametrize("name", COUNTS)
def test_nonpositive_counts_are_rejected(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"train.{name} is {value}; it must be at least 1"):
            replace(Train(), **{name: value})


@pytest.mark.parametrize("name", ["every", "batches", "batch_size"])
def test_empty_evaluation_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluate.{name} is 0; it must be at least 1"):
        replace(Evaluate(), **{name: 0})


def test_require_at_least_names_the_value_the_rule_and_the_alternative() -> None:
    require_at_least(1, "X.", top_k=1, window=None)
    with pytest.raises(ConfigError, match=r"^X\.top_k is 0; it must be at least 1$"):
        require_at_least(1, "X.", window=None, top_k=0)
    with pytest.raises(ConfigError, match=r"^top_k is nan; it must be at least 0\.5, or None for all ids$"):
        require_at_least(0.5, "", "or None for all ids", top_k=float("nan"))


def test_names_of_config_classes_are_unique() -> None:
    @dataclass(frozen=True, kw_only=True)
    class AdamW(Config):
        lr: float = 1.0

    with pytest.raises(ConfigError, match="two config classes are named AdamW"):
        config_classes()
    del AdamW
    gc.collect()
    assert "AdamW" in config_classes()


def test_added_field_with_its_default_changes_no_fingerprint():
    @dataclass(frozen=True, kw_only=True)
    class Grown(Config):
        """Config whose field `late` was added later."""

        early: int = 1
        late: float = added_field(0.5)

    assert to_json(Grown()) == {"schema": SCHEMA_VERSION, "class": "Grown", "early": 1}
    assert from_json(to_json(Grown()), Grown) == Grown()
    changed = Grown(late=0.25)
    assert to_json(changed)["late"] == 0.25 and from_json(to_json(changed), Grown) == changed
    assert fingerprint(changed) != fingerprint(Grown())
    assert diff(Grown(), changed) == ["late: (absent) -> 0.25"]
