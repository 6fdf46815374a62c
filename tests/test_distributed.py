"""Results do not depend on the number of devices and processes; each device stores its share only."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from recallax.cli.main import main
from recallax.config import ConfigError
from recallax.configs import mqar_attention
from recallax.train.checkpoint import Checkpoints, CheckpointWarning
from recallax.train.distributed import Distributed
from recallax.train.mesh import make_mesh
from recallax.train.program import Program
from recallax.train.runtime_messages import LOST_PROCESS, replace_runtime_messages

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
from recallax.train.mesh import make_reader_mesh
from recallax.train.program import Program

folder, steps, meshes = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
config = mqar_attention.get_tiny()
results = {}
for name, (data, fsdp) in meshes.items():
    train = replace(config.train, data_parallel=data, fsdp=fsdp)
    program = Program(replace(config, train=train, evaluate=replace(config.evaluate, batch_size=8)))
    state, losses = program.init_state(), []
    for index in range(steps):
        state, report = program.step(state, program.batch(index))
        losses.append(float(report.loss))
    arrays = (state.params, state.optimizer)
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if leaf.ndim]
    results[name] = {
        "losses": losses,
        "valid": program.evaluate(state, "valid"),
        "bytes": max(
            sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == device)
            for device in program.mesh.devices.flat
        ),
        "total": sum(leaf.nbytes for leaf in leaves),
        "same_sharding": jax.tree.map(lambda leaf: leaf.sharding, state)
        == jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state),
    }
    if name == "both":
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(steps, state, {})
            other = Program(replace(config, train=replace(config.train, data_parallel=1, fsdp=8),
                                    evaluate=replace(config.evaluate, batch_size=8)))
            there = checkpoints.restore(other.abstract_state).state
        results["restored"] = all(
            bool(np.array_equal(a, b)) and b.sharding == c.sharding
            for a, b, c in zip(*map(jax.tree.leaves, (arrays, (there.params, there.optimizer),
                                                      (other.abstract_state.params, other.abstract_state.optimizer))))
        )
for fsdp, rows in ((8, 8), (16, 12), (6, 8), (1, 7)):
    train, evaluate = replace(config.train, fsdp=fsdp), replace(config.evaluate, batch_size=rows)
    results[f"reader {fsdp} {rows}"] = list(
        make_reader_mesh(replace(config, train=train, evaluate=evaluate)).shape.values()
    )
print(json.dumps(results))
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
    expected, results = meshes[1]["one"], meshes[1][name]
    assert results["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert results["valid"] == pytest.approx(expected["valid"], rel=1e-5)
    assert results["same_sharding"], "a step must not change the sharding of the state"


def test_memory_per_device_falls_with_fsdp(meshes: tuple[Path, dict[str, Any]]) -> None:
    """This holds for parameters and moments; arrays without a divisible axis (norm scales) are replicated."""
    num_bytes = {name: meshes[1][name]["bytes"] for name in MESHES}
    total = meshes[1]["one"]["total"]
    assert num_bytes["one"] == num_bytes["data"] == total
    assert total / 2 <= num_bytes["both"] < 0.6 * total
    assert total / 8 <= num_bytes["fsdp"] < 0.25 * total


@pytest.mark.fault("R15")
def test_a_checkpoint_is_restored_on_another_mesh(meshes: tuple[Path, dict[str, Any]]) -> None:
    folder, results = meshes
    assert results["restored"], "from 4 x 2 devices on 1 x 8"
    config = mqar_attention.get_tiny()
    program = Program(
        replace(config, evaluate=replace(config.evaluate, batch_size=8))
    )  # on the single device of this process
    with Checkpoints(folder, max_to_keep=None) as checkpoints, pytest.warns(CheckpointWarning, match="not bit for bit"):
        restored = checkpoints.restore(program.abstract_state)
    assert restored is not None and restored.step == STEPS
    assert program.evaluate(restored.state, "valid") == pytest.approx(results["both"]["valid"], rel=1e-5)


def test_readers_use_the_devices_that_can_share_a_batch(meshes: tuple[Path, dict[str, Any]]) -> None:
    """The mesh of the run where it fits, then the largest number of eight devices that divides the rows."""
    found = {name: shape for name, shape in meshes[1].items() if name.startswith("reader")}
    assert found == {"reader 8 8": [1, 8], "reader 16 12": [3, 2], "reader 6 8": [4, 2], "reader 1 7": [7, 1]}


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
    """Processes of one run, with two devices each."""

    def __init__(self, folder: Path, *more: str, max_file_kib: int | None = None):
        """Start the processes; the first one cannot write files of more than `max_file_kib`, if that is given."""
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
                if i == 0 and max_file_kib is not None:
                    command = ["bash", "-c", f'ulimit -f {max_file_kib}; exec "$@"', "bash", *command]
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
    """Run two processes, send SIGTERM to one of them, and resume the run to its end."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    job = Job(folder)
    deadline = time.monotonic() + 180
    while not any(row["kind"] == "train" for row in read(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.processes[1].send_signal(signal.SIGTERM)
    stopped = job.wait()
    saved = steps(folder)
    return {"folder": folder, "stopped": stopped, "saved": saved, "finished": Job(folder).wait()}


@pytest.mark.fault("R4")
def test_signal_to_one_process_stops_both_at_the_same_step(pair: dict[str, Any]) -> None:
    statuses, errors = pair["stopped"]
    assert statuses == [75, 75], errors
    step = pair["saved"][-1]
    assert all(f"stopped at step {step};" in error for error in errors) and step < 60
    events = [row for row in read(pair["folder"]) if row["kind"] == "event"]
    assert [(row["event"], row["step"]) for row in events] == [("interrupted", step)]


@pytest.mark.fault("R4", "R16")
def test_two_processes_equal_one(pair: dict[str, Any], tmp_path: Path) -> None:
    statuses, errors = pair["finished"]
    assert statuses == [0, 0], errors
    assert main(["train", *ARGUMENTS, "--run", str(tmp_path / "run")]) == 0
    results, expected = (
        {(r["step"], r["split"]): (r["loss"], r["accuracy"]) for r in read(folder) if r["kind"] == "eval"}
        for folder in (pair["folder"], tmp_path / "run")
    )
    assert expected.keys() == {(30, "valid"), (60, "valid"), (60, "test")}
    assert results.keys() == expected.keys()
    for key, values in expected.items():
        assert results[key] == pytest.approx(values, rel=1e-5)


def test_only_the_first_process_writes(pair: dict[str, Any]) -> None:
    rows = read(pair["folder"])
    assert [(row["processes"], row["devices"]) for row in rows if row["kind"] == "run"] == [(2, 4), (2, 4)]
    trained = [row["step"] for row in rows if row["kind"] == "train"]
    assert trained == list(range(5, 61, 5))
    assert (pair["folder"] / "lock").read_bytes() == b""
    assert len(list((pair["folder"] / "tensorboard").iterdir())) <= 2  # one file per start of process 0


def test_all_processes_reject_a_folder_together(pair: dict[str, Any]) -> None:
    """Process 0 detects that the folder contains another run; the other process must not wait for it."""
    start = time.monotonic()
    statuses, errors = Job(pair["folder"], "--optim.lr=0.5").wait()
    assert statuses == [2, 2]
    assert "optim.lr: 0.01 -> 0.5" in errors[0] and "process 0 could not open the folder" in errors[1]
    assert time.monotonic() - start < 60 and "Traceback" not in "".join(errors)


# Checkpoints whose arrays are sharded between processes


SHARDED = """
import json, sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from recallax.train.checkpoint import Checkpoints
from tests.test_distributed import flip_bit, sharded_values

folder, index = Path(sys.argv[1]), int(sys.argv[3])
jax.distributed.initialize(sys.argv[2], 2, index)

def state(step, shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
    values = sharded_values(step)
    shardings = {"w": NamedSharding(mesh, P(None, "fsdp")), "b": NamedSharding(mesh, P())}
    return {k: jax.make_array_from_callback(v.shape, shardings[k], lambda i, v=v: v[i]) for k, v in values.items()}

results = []
with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state(step, (1, 4)), {})
    for shape in [(1, 4), (2, 2), (4, 1)]:
        for owner in (None, 0, 1):
            if index == 0 and owner is not None:
                flip_bit(max((folder / f"2/state/ocdbt.process_{owner}/d").iterdir(), key=lambda p: p.stat().st_size))
            multihost_utils.sync_global_devices("flipped")
            restored = checkpoints.restore(state(0, shape))
            expected = jax.tree.leaves(state(restored.step, shape))
            equal = [(s.data == e.data).all() for x, y in zip(jax.tree.leaves(restored.state), expected)
                     for s, e in zip(x.addressable_shards, y.addressable_shards)]
            results.append([shape, owner, restored.step, bool(np.all(equal))])
            multihost_utils.sync_global_devices("restored")
            if index == 0 and owner is not None:
                (folder / "quarantine/2").rename(folder / "2")
                flip_bit(max((folder / f"2/state/ocdbt.process_{owner}/d").iterdir(), key=lambda p: p.stat().st_size))
print(json.dumps(results))
"""


def sharded_values(step: int) -> dict[str, np.ndarray]:
    """A state of noise, in which an orbax file has few bytes besides values."""
    rng = np.random.default_rng(step)
    return {"w": rng.normal(size=(64, 256)).astype(np.float32), "b": rng.normal(size=64).astype(np.float32)}


def flip_bit(path: Path, position: float = 0.5) -> None:
    """Flip a bit of a file; flipping it again restores the file."""
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """Checkpoints of two processes, and the steps that both restored after a bit of the newest had been flipped."""
    folder = tmp_path_factory.mktemp("sharded") / "checkpoints"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", SHARDED, str(folder), address, str(index)] for index in range(PROCESSES)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(2)}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    return folder, first


@pytest.mark.fault("R7", "R15")
def test_processes_verify_shards_on_any_mesh(sharded: tuple[Path, list[list[Any]]]) -> None:
    for shape, owner, step, equal in sharded[1]:
        assert equal and step == (2 if owner is None else 1), (shape, owner)


@pytest.mark.fault("R7")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_flipped_bits_in_shards_are_detected_on_one_device(
    sharded: tuple[Path, list[list[Any]]], tmp_path: Path, seed: int
) -> None:
    folder, rng = Path(shutil.copytree(sharded[0], tmp_path / "checkpoints")), np.random.default_rng(seed)
    abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in sharded_values(0).items()}
    files = [path for path in (folder / "2/state").rglob("*") if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    steps = []
    with Checkpoints(folder, max_to_keep=None) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(34):
            path, position = files[rng.choice(len(files), p=sizes / sizes.sum())], rng.random()
            flip_bit(path, position)
            restored = checkpoints.restore(abstract)
            flip_bit(path, position)
            assert restored is not None
            steps.append(restored.step)
            for name, values in sharded_values(restored.step).items():
                assert np.array_equal(restored.state[name], values), (path, position)
    assert steps.count(1) > 10, "the flips are in values"


# Failures of one process

HEARTBEAT = "--distributed.heartbeat-timeout=5"


@pytest.mark.fault("R9")
def test_a_process_that_cannot_save_ends_the_other(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", HEARTBEAT, "--model.d-model=256", max_file_kib=100)
    statuses, _ = job.wait()
    assert all(statuses), statuses
    time.sleep(1)  # the filter of the standard error ends after its process
    *_, reason = job.errors[0].read_text().splitlines()  # after messages of orbax
    assert reason.startswith("recallax: step 20 was not saved in")
    (line,) = job.errors[1].read_text().splitlines()
    assert line.startswith("recallax: another process of the run failed")


@pytest.mark.fault("R5")
@pytest.mark.parametrize(
    ("index", "number"),
    [
        (0, signal.SIGSTOP),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.full),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.full),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_a_process_ends_if_the_other_one_dies_or_stops(tmp_path: Path, index: int, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    job = Job(folder, "--train.steps=1000000", HEARTBEAT)
    try:
        deadline = time.monotonic() + 180
        while not any(row["kind"] == "train" for row in read(folder)) and time.monotonic() < deadline:
            time.sleep(0.01)
        job.processes[index].send_signal(number)
        start = time.monotonic()
        assert job.processes[1 - index].wait(60) != 0
        assert time.monotonic() - start < 30
        time.sleep(1)
    finally:
        for process in job.processes:
            process.kill()
            process.wait()
    error = job.errors[1 - index].read_text()
    assert error.startswith("recallax: ") and "another process of the run" in error and error.count("\n") == 1


def test_messages_of_the_runtime_are_replaced() -> None:
    def header(level: str, source: str) -> bytes:
        return f"{level}1201 18:51:30.758870   24644 {source}:1518] text\n".encode()

    end = header("F", "client.h")
    runtime = [header("E", "coordination_service.cc"), b"details\n", end, b"    @     0x7f32ea2f81b4  Flush()\n"]
    other = [b"step 1\n", header("W", "gpu_timer.cc"), b"more\n"]
    assert list(replace_runtime_messages([*other, *runtime])) == [*other, LOST_PROCESS]
    assert list(replace_runtime_messages([*runtime, end])) == [LOST_PROCESS]
    assert list(replace_runtime_messages([*runtime, header("F", "another.cc"), b"    @     0x1  f()\n"])) == [
        LOST_PROCESS
    ]
    reason = b"recallax: step 1 was not saved\n"
    assert list(replace_runtime_messages([*runtime[:2], reason, *runtime])) == [reason]
    assert list(replace_runtime_messages([*runtime[:2], b"Traceback (most recent call last):\n", b"  x\n"])) == [
        b"Traceback (most recent call last):\n",
        b"  x\n",
    ]


def test_one_process_needs_no_coordinator() -> None:
    Distributed().initialize()
    unnumbered, beyond = (
        Distributed(num_processes=2),
        Distributed(coordinator_address="127.0.0.1:9", num_processes=2, process_id=2),
    )
    for wrong in (unnumbered, beyond, Distributed(coordinator_address=":9", num_processes=2, process_id=0)):
        with pytest.raises(ConfigError, match=r"distributed\."):
            wrong.initialize()
