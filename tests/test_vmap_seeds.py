"""Training several seeds in one program gives the results of single runs."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.cli.main import main
from recallax.config import ConfigError, fingerprint
from recallax.configs import mqar_micro
from recallax.sweep import Backend, read_results, run_sweep
from recallax.sweep.worker import run_worker
from recallax.tasks import MQAR, MixtureSlice
from recallax.train import vmapped_runs
from recallax.train.checkpoint import Checkpoints
from recallax.train.curriculum.stages import Curriculum, Stage
from recallax.train.log import LogRow, read_log
from recallax.train.loop import train
from recallax.train.program import Program
from recallax.train.run_config import AdamW, RunConfig
from recallax.train.step import TrainState
from recallax.train.vmapped_runs import check_vmappable, train_vmapped

FILE = """
from tests.test_vmap_seeds import config_with_seed
from recallax.sweep import Trial

STAGES = [lambda rows: [Trial({"seed": seed}, config_with_seed(seed)) for seed in (0, 1, 2)]]
"""
NONFINITE_SEED = 2


def config_with_seed(seed: int) -> RunConfig:
    """Return a config with twelve steps, two more than a run with a non-finite parameter completes."""
    tiny = mqar_micro.get_tiny()
    train = replace(tiny.train, steps=12, log_every=6, save_every=6, seed=seed, data_seed=seed)
    return replace(tiny, train=train, evaluate=replace(tiny.evaluate, every=6))


def read_run(abstract: TrainState, folder: Path) -> tuple[TrainState, list[LogRow]]:
    with Checkpoints(folder / "checkpoints", max_to_keep=None) as checkpoints:
        restored = checkpoints.restore(abstract)
    assert restored is not None
    return restored.state, read_log(folder / "log.jsonl")


def test_vmapped_seeds_equal_single_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds train together, stop after half of the steps, and resume; the third one is never finite.

    The second seed is compared with a single run: files and fields of the log rows are equal, losses agree to a
    relative 1e-5, and parameters, which twelve updates change by up to 1e-2 each, to an absolute 2e-5.
    """
    file, out, configs = (
        tmp_path / "sweep.py",
        tmp_path / "runs",
        [config_with_seed(seed) for seed in (0, 1, NONFINITE_SEED)],
    )
    file.write_text(FILE)
    names = [fingerprint(config) for config in configs]
    initial = Program.init_state

    def init_state(self: Program) -> TrainState:
        state = initial(self)
        finite = self.config.train.seed != NONFINITE_SEED
        return state if finite else state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))

    monkeypatch.setattr(Program, "init_state", init_state)
    with monkeypatch.context() as patch:
        patch.setattr(vmapped_runs.StopSignals, "stop_requested", lambda self, step: step == 6)
        assert run_worker([str(file), str(out), "0", *names]) == os.EX_TEMPFAIL
    assert [read_log(out / name / "log.jsonl")[-1]["event"] for name in names] == ["interrupted"] * 3
    assert run_worker([str(file), str(out), "0", *names]) == 1, "one run failed"
    assert list(read_results(out)) == sorted(names[:2]), "the other runs are not affected"
    events = [row["event"] for row in read_log(out / names[2] / "log.jsonl") if row["kind"] == "event"]
    assert events == ["interrupted", "non-finite"]

    alone, config = tmp_path / "alone", configs[1]
    train(config, alone, name="1")
    abstract = Program(config).abstract_state
    (state, log), (other, other_log) = read_run(abstract, alone), read_run(abstract, out / names[1])
    other_log = [row for row in other_log if row["kind"] != "event" and (row["kind"], row["step"]) != ("run", 6)]
    assert (alone / "config.json").read_text() == (out / names[1] / "config.json").read_text()
    assert {path.name for path in alone.iterdir()} | {"row.json"} == {path.name for path in (out / names[1]).iterdir()}
    assert [[*row] for row in log] == [[*row] for row in other_log], "the same rows with the same fields"
    for row, other_row in zip(log, other_log, strict=True):
        for name in row.keys() - {"seconds", "tokens_per_second"}:
            expected = pytest.approx(row[name], rel=1e-5, abs=1e-6) if isinstance(row[name], float) else row[name]
            assert other_row[name] == expected, (name, row, other_row)
    assert int(other.step) == 12 and int(other.skipped) == 0
    assert jnp.array_equal(jax.random.key_data(other.key), jax.random.key_data(state.key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5), state.params, other.params)
    first, _ = read_run(abstract, out / names[0])
    differences = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (first.params, other.params)), strict=True)
    ]
    assert max(differences) > 0.1, "different seeds have different results"


class RecordingBackend(Backend):
    """Backend that writes a row for every requested trial and records the requests."""

    workers = 1

    def __init__(self) -> None:
        self.requests: list[list[str]] = []

    def run(self, arguments: list[str], log: Path) -> int:
        _, out, _, *names = arguments
        self.requests.append(names)
        for name in names:
            (Path(out) / name).mkdir()
            (Path(out) / name / "row.json").write_text(json.dumps({"config": name, "valid": {"accuracy": 0.5}}))
        return 0

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(("vmap_seeds", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_sweep_groups_seeds_into_processes(tmp_path: Path, vmap_seeds: int, sizes: list[int]) -> None:
    (tmp_path / "sweep.py").write_text(FILE)
    backend = RecordingBackend()
    assert run_sweep(tmp_path / "sweep.py", tmp_path / "runs", backend, vmap_seeds=vmap_seeds) == 0
    assert [len(names) for names in backend.requests] == sizes
    assert sorted(name for names in backend.requests for name in names) == sorted(
        fingerprint(config_with_seed(seed)) for seed in (0, 1, 2)
    )


def test_runs_that_cannot_be_vmapped_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"differ in train\.seed and train\.data_seed alone"):
        check_vmappable([config_with_seed(0), replace(config_with_seed(1), optim=AdamW(lr=1.0))])
    slices = (MixtureSlice(length=16, num_kv_pairs=2), MixtureSlice(length=32, num_kv_pairs=2))
    mixed = [
        replace(config_with_seed(seed), task=MQAR(vocab_size=64, mixture=slices, test_mixture=slices))
        for seed in (0, 1)
    ]
    with pytest.raises(ConfigError, match="rows of 16, 32 tokens cannot be trained at once"):
        check_vmappable(mixed)
    check_vmappable(
        [replace(config, train=replace(config.train, data_seed=7)) for config in mixed]
    )  # equal data seeds draw equal lengths
    stages = Curriculum(stages=(Stage(name="all"),))
    with pytest.raises(ConfigError, match="a run with a curriculum"):
        check_vmappable([replace(config_with_seed(seed), curriculum=stages) for seed in (0, 1)])
    monkeypatch.setattr(vmapped_runs, "Program", lambda config: SimpleNamespace(mesh=SimpleNamespace(size=2)))
    with pytest.raises(ConfigError, match=r"share one device, and this run takes 2; set train\.data_parallel to 1"):
        train_vmapped([config_with_seed(0), config_with_seed(1)], [tmp_path / "0", tmp_path / "1"], ["0", "1"])
    (tmp_path / "sweep.py").write_text(FILE)
    assert main(["sweep", str(tmp_path / "sweep.py"), "--vmap-seeds", "0", "--out", str(tmp_path / "runs")]) == 2
    assert "0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "0").exists()
