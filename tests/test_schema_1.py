"""Configs, runs and exports written by version 0.1.0 can still be read, resumed and imported.

`tests/schema_1/make_fixtures.py` wrote the fixtures with the code of that version.
"""

import hashlib
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from recallax.config import ConfigError, fingerprint, from_json, to_json
from recallax.convert import import_run
from recallax.train import RunConfig, RunFolderError, evaluate_run, read_log, restore_run, train
from recallax.train.loop import run_steps
from recallax.train.run_folder import RunFolder, recorded_fingerprint, run_folder_name, run_folder_path

FIXTURES = Path(__file__).parent / "schema_1"
CONFIGS: dict[str, dict[str, Any]] = json.loads((FIXTURES / "configs.json").read_text())
RUNS = ("mqar_mom", "mqar_titans", "mqar_hydra_staged")
EXPORTS = {"export_mom": "mqar_mom", "export_titans": "mqar_titans", "export_orbax": "mqar_mom"}

pytestmark = pytest.mark.filterwarnings("ignore::recallax.train.checkpoint.CheckpointWarning")


def current_config(name: str) -> RunConfig:
    module, form = name.split(".")
    return getattr(importlib.import_module(f"recallax.configs.{module}"), form)()


def copy_run(name: str, parent: Path) -> Path:
    """Copy a fixture, since opening a run for training writes to its folder."""
    return Path(shutil.copytree(FIXTURES / name, parent / name))


def run_config(name: str) -> RunConfig:
    return from_json(json.loads((FIXTURES / name / "config.json").read_text()), RunConfig)


def digest(leaf: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_decode_and_encode(name: str) -> None:
    recorded, expected = CONFIGS[name], current_config(name)
    decoded = from_json(recorded["config"], RunConfig)
    assert decoded == expected
    assert to_json(decoded, schema=1) == recorded["config"]
    assert fingerprint(decoded, schema=1) == recorded["fingerprint"]
    assert from_json(to_json(decoded), RunConfig) == expected


@pytest.mark.parametrize("name", RUNS)
def test_runs_restore_and_evaluate(name: str) -> None:
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    _, restored = restore_run(FIXTURES / name)
    leaves = jax.tree_util.tree_flatten_with_path(restored.state.params)[0]
    digests = {"/".join(str(getattr(key, "key", key)) for key in path): digest(leaf) for path, leaf in leaves}
    assert digests == expected["params"]
    assert evaluate_run(FIXTURES / name, "test") == pytest.approx(expected["test"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_runs_resume(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is complete, so that resuming it evaluates it, without a step and without a second evaluation row."""
    folder = copy_run(name, tmp_path)
    config, expected = run_config(name), json.loads((folder / "expected.json").read_text())["test"]
    rows = read_log(folder / "log.jsonl")
    steps: list[int] = []

    def run_no_steps(executor: Any, *rest: Any) -> None:
        steps.extend(range(executor.runs[0].start_step, config.train.steps))
        run_steps(executor, *rest)

    monkeypatch.setattr("recallax.train.loop.run_steps", run_no_steps)
    metrics = train(config, folder)
    assert steps == []
    assert metrics == pytest.approx({k: v for k, v in expected.items() if k != "step"}, rel=1e-5)
    after = read_log(folder / "log.jsonl")
    assert after[: len(rows)] == rows and [row["kind"] for row in after[len(rows) :]] == ["run"]
    assert after[-1]["step"] == expected["step"] == config.train.steps


def test_a_folder_of_another_config_is_rejected(tmp_path: Path) -> None:
    folder = copy_run("mqar_mom", tmp_path)
    config = run_config("mqar_mom")
    with pytest.raises(RunFolderError, match=r"train\.steps: 4 -> 5"):
        RunFolder(folder, replace(config, train=replace(config.train, steps=5)))


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_import(name: str, tmp_path: Path) -> None:
    run = EXPORTS[name]
    folder = import_run(FIXTURES / name, run_config(run), tmp_path / "imported")
    _, imported = restore_run(folder)
    _, original = restore_run(FIXTURES / run)
    jax.tree.map(np.testing.assert_array_equal, imported.state.params, original.state.params)


def test_folders_are_found_by_either_fingerprint(tmp_path: Path) -> None:
    config = current_config("mqar_mom.get_tiny")
    old, new = fingerprint(config, schema=1), fingerprint(config)
    assert old == CONFIGS["mqar_mom.get_tiny"]["fingerprint"] != new
    assert run_folder_path(tmp_path, "mom", config) == tmp_path / run_folder_name("mom", config)
    assert recorded_fingerprint(tmp_path, config) == new
    for folder in (tmp_path / f"mom-{old}", tmp_path / old):
        folder.mkdir()
    assert run_folder_path(tmp_path, "mom", config) == tmp_path / f"mom-{old}"
    assert recorded_fingerprint(tmp_path, config) == old
    for folder in (tmp_path / f"mom-{new}", tmp_path / new):
        folder.mkdir()
    assert run_folder_path(tmp_path, "mom", config) == tmp_path / f"mom-{new}"
    assert recorded_fingerprint(tmp_path, config) == new


def changed(name: str, old: str, new: str) -> dict[str, Any]:
    """JSON of a config with a text replaced."""
    text = json.dumps(CONFIGS[name]["config"])
    assert old in text
    return json.loads(text.replace(old, new))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": 3, "class": "RunConfig"}, "schema is 3; this version of recallax reads schemas 1 and 2"),
        (changed("mqar_delta_net.get_config", '"max_beta": 1.0', '"max_beta": 1.5'), "DeltaNet.max_beta is 1.5"),
        (changed("mqar_mom.get_config", '"warmup": ', '"warm": '), "config.optim has no field 'warm'"),
        (changed("mqar_mom.get_config", '"class": "MoM"', '"class": "MoN"'), "'MoN'; did you mean 'MoM'"),
    ],
    ids=["schema", "value", "field", "class"],
)
def test_unknown_names_and_values_are_rejected(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_json(data, RunConfig)
    assert message in str(error.value)


def test_an_unknown_schema_is_not_written() -> None:
    with pytest.raises(ConfigError, match="schema is 3"):
        to_json(current_config("mqar_mom.get_tiny"), schema=3)
