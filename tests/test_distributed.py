"""Results do not depend on the number of devices and processes; each device stores its share only."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from recallax.cli.main import main
from recallax.config import ConfigError
from recallax.configs import mqar_attention
from recallax.train.checkpoint import Checkpoints, CheckpointWarning
from recallax.train.distributed import Distributed
from recallax.train.mesh import make_mesh
from recallax.train.program import Program

pytestmark = pytest.mark.xdist_group("distributed")  # one process: the tests share runs

MESHES = {"one": (1, 1), "data": (8, 1), "both": (4, 2), "fsdp": (1, 8)}
STEPS = 3


def environment(devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


# Eight devices in one process

SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from recallax.configs import mqar_attention
from recallax.train.checkpoint import Checkpoints
from recallax.train.program import Program

folder, steps, meshes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
config = mqar_attention.get_tiny()
found = {}
for name, (data, fsdp) in meshes.items():
    train = replace(config.train, data_parallel=data, fsdp=fsdp)
    program = Program(replace(config, train=train, evaluate=replace(config.evaluate, batch_size=8)))
    state, losses = program.init_state(), []
    for index in range(steps):
        state, report = program.step(state, program.batch(index))
        losses.append(float(report.loss))
    arrays = (state.params, state.optimizer)
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if leaf.ndim]
    found[name] = {
        "losses": losses,
        "valid": program.evaluate(state, "valid"),
        "bytes": max(
            sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device)
            for device in program.mesh.devices.flat
        ),
        "total": sum(leaf.nbytes for leaf in leaves),
        "kept": jax.tree.map(lambda leaf: leaf.sharding, state)
        == jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state),
    }
    if name == "both":
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(steps, state, {})
            other = Program(replace(config, train=replace(config.train, data_parallel=1, fsdp=8),
                                    evaluate=replace(config.evaluate, batch_size=8)))
            there = checkpoints.restore(other.abstract_state).state
        found["restored"] = all(
            bool(np.array_equal(a, b)) and b.sharding == c.sharding
            for a, b, c in zip(*map(jax.tree.leaves, (arrays, (there.params, there.optimizer),
                                                      (other.abstract_state.params, other.abstract_state.optimizer))))
        )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("meshes") / "checkpoints"
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), str(STEPS), json.dumps(MESHES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(8))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["data", "both", "fsdp"])
def test_every_mesh_equals_one_device(meshes: tuple[Path, dict[str, Any]], name: str) -> None:
    expected, found = meshes[1]["one"], meshes[1][name]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["valid"] == pytest.approx(expected["valid"], rel=1e-5)
    assert found["kept"], "a step must leave the state key it found it"


def test_memory_per_device_falls_with_fsdp(meshes: tuple[Path, dict[str, Any]]) -> None:
    """Parameters and moments; what has no divisible axis (norm scales) stays whole."""
    num_bytes = {name: meshes[1][name]["bytes"] for name in MESHES}
    total = meshes[1]["one"]["total"]
    assert num_bytes["one"] == num_bytes["data"] == total
    assert total / 2 <= num_bytes["both"] < 0.6 * total
    assert total / 8 <= num_bytes["fsdp"] < 0.25 * total


def test_a_checkpoint_is_restored_on_another_mesh(meshes: tuple[Path, dict[str, Any]]) -> None:
    folder, found = meshes
    assert found["restored"], "from 4 x 2 devices on 1 x 8"
    config = mqar_attention.get_tiny()
    program = Program(replace(config, evaluate=replace(config.evaluate, batch_size=8)))  # and on the one device here
    with Checkpoints(folder, max_to_keep=None) as checkpoints, pytest.warns(CheckpointWarning, match="not bit for bit"):
        restored = checkpoints.restore(program.abstract_state)
    assert restored is not None and restored.step == STEPS
    assert program.evaluate(restored.state, "valid") == pytest.approx(found["both"]["valid"], rel=1e-5)


# Meshes that are rejected


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("train", {"data_parallel": 16}, "train.data_parallel 16 x train.fsdp 1 does not fit 8 devices"),
        ("train", {"fsdp": 16}, "train.data_parallel 0 x train.fsdp 16 does not fit 8 devices"),
        (
            "train",
            {"batch_size": 12},
            "train.batch_size / train.gradient_accumulation_steps is 12 rows, which 8 devices cannot share",
        ),
        (
            "train",
            {"gradient_accumulation_steps": 2},
            "train.batch_size / train.gradient_accumulation_steps is 4 rows, which 8 devices cannot share",
        ),
        ("evaluate", {"batch_size": 12}, "evaluate.batch_size is 12 rows, which 8 devices cannot share"),
    ],
)
def test_unsuitable_mesh_is_rejected(
    part: str, fields: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = mqar_attention.get_tiny()
    config = replace(config, evaluate=replace(config.evaluate, batch_size=8))
    with pytest.raises(ConfigError) as error:
        make_mesh(replace(config, **{part: replace(getattr(config, part), **fields)}))
    assert message in str(error.value)


# Two processes


PROCESSES = 2
TRAIN = ["--train.steps=60", "--train.batch-size=8", "--train.log-every=5", "--train.save-every=20"]
ARGUMENTS = ["mqar_micro", *TRAIN, "--evaluate.batches=2", "--evaluate.batch-size=8", "--evaluate.every=30"]


class Job:
    """The processes of one run, each with two devices."""

    def __init__(self, folder: Path, *more: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.errors = [folder.with_suffix(f".{i}.err") for i in range(PROCESSES)]
        self.processes = []
        for i, error in enumerate(self.errors):
            key = [f"--distributed.coordinator-address={address}", f"--distributed.num-processes={PROCESSES}"]
            key += [f"--distributed.process-id={i}", f"--run={folder}"]
            command = [sys.executable, "-m", "recallax", "train", *ARGUMENTS, *more, *key]
            with open(error, "w") as err:
                out = subprocess.DEVNULL
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment(2)))

    def wait(self) -> tuple[list[int], list[str]]:
        try:
            statuses = [process.wait(180) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return statuses, [error.read_text() for error in self.errors]


def read(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]] if log.exists() else []


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two processes of which one gets SIGTERM, continued to its end."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    job = Job(folder)
    deadline = time.monotonic() + 180
    while not any(row["kind"] == "train" for row in read(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.processes[1].send_signal(signal.SIGTERM)
    stopped = job.wait()
    saved = steps(folder)
    return {"folder": folder, "stopped": stopped, "saved": saved, "finished": Job(folder).wait()}


def test_signal_to_one_process_stops_both_at_the_same_step(pair: dict[str, Any]) -> None:
    statuses, errors = pair["stopped"]
    assert statuses == [75, 75], errors
    step = pair["saved"][-1]
    assert all(f"stopped at step {step};" in error for error in errors) and step < 60
    events = [row for row in read(pair["folder"]) if row["kind"] == "event"]
    assert [(row["event"], row["step"]) for row in events] == [("interrupted", step)]


def test_two_processes_equal_one(pair: dict[str, Any], tmp_path: Path) -> None:
    statuses, errors = pair["finished"]
    assert statuses == [0, 0], errors
    assert main(["train", *ARGUMENTS, "--run", str(tmp_path / "run")]) == 0
    found, expected = (
        {(r["step"], r["split"]): (r["loss"], r["accuracy"]) for r in read(folder) if r["kind"] == "eval"}
        for folder in (pair["folder"], tmp_path / "run")
    )
    assert expected.keys() == {(30, "valid"), (60, "valid"), (60, "test")}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5)


def test_only_the_first_process_writes(pair: dict[str, Any]) -> None:
    rows = read(pair["folder"])
    assert [(row["processes"], row["devices"]) for row in rows if row["kind"] == "run"] == [(2, 4), (2, 4)]
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert trained == list(range(5, 61, 5))
    assert (pair["folder"] / "lock").read_bytes() == b""
    assert len(list((pair["folder"] / "tensorboard").iterdir())) <= 2  # one file per life


def test_all_processes_reject_a_folder_together(pair: dict[str, Any]) -> None:
    """Process 0 sees that the folder is another run's; the other must not wait for it."""
    start = time.monotonic()
    statuses, errors = Job(pair["folder"], "--optim.lr=0.5").wait()
    assert statuses == [2, 2]
    assert "optim.lr: 0.01 -> 0.5" in errors[0] and "process 0 could not open the folder" in errors[1]
    assert time.monotonic() - start < 60 and "Traceback" not in "".join(errors)


def test_one_process_needs_no_coordinator() -> None:
    Distributed().initialize()
    unnumbered, beyond = (
        Distributed(num_processes=2),
        Distributed(coordinator_address="127.0.0.1:9", num_processes=2, process_id=2),
    )
    for wrong in (unnumbered, beyond, Distributed(coordinator_address=":9", num_processes=2, process_id=0)):
        with pytest.raises(ConfigError, match=r"distributed\."):
            wrong.initialize()
