"""Runs refuse checkpoints of other configs and lost checkpoints; readers work beside a job and on other devices."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recallax.config import ConfigError, fingerprint, to_json
from recallax.configs import mqar_attention, mqar_micro
from recallax.convert.run_weights import read_run_weights
from recallax.report import write_report
from recallax.train import checkpoint
from recallax.train.checkpoint import CheckpointError, Checkpoints
from recallax.train.checkpoint_description import recorded_differences
from recallax.train.inference import load_trained_model
from recallax.train.log import RunLog, read_log
from recallax.train.loop import evaluate_run, restore_run, train
from recallax.train.program import Program
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolder, RunFolderError

CONFIG = mqar_micro.get_tiny()


def with_train(config: RunConfig, **fields: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **fields))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints of two and four; tests change copies of it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(CONFIG, folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# Checkpoints of another config


def report(folder: Path) -> None:
    write_report([folder], folder.with_suffix(".html"))


READERS: dict[str, Callable[[Path], object]] = {
    "eval": lambda folder: evaluate_run(folder, "test", 1),
    "generate": load_trained_model,
    "export": read_run_weights,
    "report": report,
}


@pytest.mark.fault("R17")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("fields", "line"), [({"seed": 7}, "train.seed: 0 -> 7"), ({"steps": 2}, "steps: 4 -> 2")])
def test_readers_refuse_checkpoints_of_another_config(run: Path, name: str, fields: dict[str, int], line: str) -> None:
    READERS[name](run)
    (run / "config.json").write_text(json.dumps(to_json(with_train(CONFIG, **fields))))
    with pytest.raises(
        (CheckpointError, RunFolderError), match=rf"another config(?s:.*)\n  (train\.)?{line}\n"
    ) as error:
        READERS[name](run)
    assert str(error.value).count(" -> ") == 2, "one line in the head and one field"


@pytest.mark.fault("R17")
def test_training_refuses_checkpoints_of_another_config(run: Path) -> None:
    config = with_train(CONFIG, seed=7)
    (run / "config.json").write_text(json.dumps(to_json(config)))
    before = (run / "log.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"checkpoints/4 was written by a run of another config(?s:.*)train\.seed"
    ):
        train(config, run)
    assert (run / "log.jsonl").read_bytes() == before


def test_checkpoints_without_a_fingerprint_or_of_schema_1_fit() -> None:
    other = with_train(CONFIG, seed=7)
    for metadata in (
        {},
        {"fingerprint": fingerprint(CONFIG)},
        {"fingerprint": fingerprint(CONFIG, schema=1)},
        {"config": to_json(CONFIG)},
        {"config": to_json(CONFIG, schema=1), "fingerprint": "of an older version"},
    ):
        assert recorded_differences(metadata, CONFIG) == []
        assert recorded_differences(metadata, other) == [] or metadata, (
            "only a checkpoint without either fits every run"
        )
    assert recorded_differences({"config": to_json(CONFIG, schema=1)}, other) == ["train.seed: 0 -> 7"]
    (line,) = recorded_differences({"fingerprint": fingerprint(CONFIG, schema=1)}, other)
    assert line.endswith(f"-> {fingerprint(other)}")


# Checkpoints that were removed


@pytest.mark.fault("R8")
@pytest.mark.parametrize(
    "remove", [shutil.rmtree, lambda folder: shutil.rmtree(folder / "4") or shutil.rmtree(folder / "2")]
)
def test_a_run_without_its_checkpoints_does_not_start_again(run: Path, remove: Callable[[Path], None]) -> None:
    remove(run / "checkpoints")
    before = (run / "log.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"the log of the run has 4 steps; restore .*log\.jsonl away"):
        train(CONFIG, run)
    assert (run / "log.jsonl").read_bytes() == before
    (run / "log.jsonl").unlink()
    train(CONFIG, run)
    assert [row["step"] for row in read_log(run / "log.jsonl") if row["kind"] == "run"] == [0]


@pytest.mark.fault("R1")
@pytest.mark.parametrize(
    ("kind", "step", "values", "had_checkpoint"),
    [
        ("train", 2, {}, False),  # killed before or while the first checkpoint was written
        ("eval", 2, {"split": "valid"}, False),
        ("event", 0, {"event": "stage"}, False),
        ("run", 0, {}, False),
        ("run", 0, {"restored": True}, True),  # an imported model
        ("run", 1, {}, True),
        ("event", 1, {"event": "interrupted"}, True),
        ("train", 3, {}, True),
        ("eval", 4, {"split": "valid"}, True),
    ],
)
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, kind: Any, step: int, values: dict[str, Any], had_checkpoint: bool
) -> None:
    config = CONFIG if step < 4 else with_train(CONFIG, save_every=100)
    RunFolder(tmp_path / "run", config).close()
    with RunLog(tmp_path / "run/log.jsonl", fingerprint(config)) as log:
        log.write(kind, step, values)
    if had_checkpoint:
        with pytest.raises(CheckpointError, match="restore the checkpoints"):
            train(config, tmp_path / "run")
    else:
        train(config, tmp_path / "run")


def test_the_log_states_whether_a_checkpoint_was_restored(run: Path) -> None:
    train(CONFIG, run)
    assert [row["restored"] for row in read_log(run / "log.jsonl") if row["kind"] == "run"] == [False, True]


# Readers beside a job


def test_a_reader_lists_again_if_retention_deletes_what_it_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer saves the steps 6 and 8 while the reader opens 4, so that neither 4 nor 2 is there any more."""
    folder = run / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        state = Program(CONFIG).init_state()
        opened: list[str] = []

        def read(path: Path) -> Any:
            opened.append(path.name)
            if len(opened) == 1:
                for step in (6, 8):
                    checkpoints.save(step, state._replace(step=np.int32(step) + state.step), {})
            return read_description(path)

        read_description = checkpoint.read_description
        monkeypatch.setattr(checkpoint, "read_description", read)
        with warnings.catch_warnings():
            warnings.simplefilter("error", checkpoint.CheckpointWarning)
            _, restored = restore_run(run)
        assert opened == ["4", "8"] and restored.step == 8
        assert checkpoints.steps() == [6, 8] and not (folder / "quarantine").exists()


# Readers on other devices


@pytest.mark.fault("R15")
def test_a_run_on_more_devices_is_read_on_one(tmp_path: Path) -> None:
    """The checkpoint is that of a state on one device, since a checkpoint does not depend on the mesh."""
    one = replace(mqar_attention.get_tiny(), evaluate=replace(mqar_attention.get_tiny().evaluate, batch_size=8))
    sharded, program = with_train(one, data_parallel=2, fsdp=4), Program(one)
    state = program.init_state()
    with RunFolder(tmp_path / "run", sharded) as folder, Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(0, state, {"config": to_json(sharded), "fingerprint": fingerprint(sharded)})
    assert evaluate_run(tmp_path / "run", "test") == {"step": 0.0, **program.evaluate(state, "test")}
    for name in ("generate", "export"):
        READERS[name](tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train\.data_parallel 2 x train\.fsdp 4 does not fit 1 devices"):
        train(sharded, tmp_path / "run")
