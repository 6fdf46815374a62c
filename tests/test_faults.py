"""Faults that have no other test: kills while files are written, clocks, environments and networks."""

import ast
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from recallax.atomic_files import write_atomic
from recallax.cli.main import main
from recallax.configs import mqar_micro
from recallax.train.checkpoint import Checkpoints
from recallax.train.checkpoint_description import list_steps, read_description
from recallax.train.distributed import Distributed
from recallax.train.log import read_log
from recallax.train.loop import train
from tests.fault_table import FAULTS, FaultCounter

PACKAGE = Path(__file__).parent.parent / "recallax"
SECRET = "hunter2-3f1c"
ONE_STEP = ["mqar_micro", "--train.steps=1", "--train.save-every=1", "--evaluate.batches=1", "--train.batch-size=2"]


@pytest.fixture(scope="module", autouse=True)
def compile_without_optimizations() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# The table of faults


def marked_faults(path: Path) -> set[str]:
    """Return the faults of the marks in a test file, without those of tests that are marked `full`."""
    faults: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        decorators = [ast.unparse(decorator) for decorator in getattr(statement, "decorator_list", [])]
        if "pytest.mark.full" not in decorators:
            calls = (node for node in ast.walk(statement) if isinstance(node, ast.Call))
            marks = (call for call in calls if ast.unparse(call.func) == "pytest.mark.fault")
            faults |= {ast.literal_eval(argument) for mark in marks for argument in mark.args}
    return faults


def test_the_table_counts_trials_and_names_faults_without_a_test(tmp_path: Path) -> None:
    counter = FaultCounter(tmp_path / "table.md")
    for outcome, trials in (("passed", 12), ("failed", 3), ("skipped", 5)):
        report = pytest.TestReport("test", ("test", 1, "test"), {}, outcome, None, "call")  # type: ignore[arg-type]
        report.user_properties += [("fault R1", trials), ("other", 1)]
        counter.pytest_runtest_logreport(report)
    assert f"| R1 | {FAULTS['R1']} | 15 | 12 |" in counter.table()
    assert counter.untried() == list(FAULTS)[1:]


def test_every_fault_has_a_test_in_the_gate() -> None:
    marked = set().union(*(marked_faults(path) for path in Path(__file__).parent.glob("test_*.py")))
    assert marked == set(FAULTS), "a fault has no test, or a mark has an unknown fault"


# Kills while checkpoints are written and deleted


def state(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.arange(1000.0) * step}


SAVE_UNTIL_KILLED = """
import os, sys
from pathlib import Path

from recallax.train.checkpoint import Checkpoints
from tests.test_faults import state

folder, last_event = Path(sys.argv[1]), int(sys.argv[2])
events = 0

def count(event, arguments):
    # Names of orbax's files are those of the step until its last rename, so every event is one of a save or a deletion.
    global events
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        events += 1
        if events == last_event:
            os._exit(9)

with Checkpoints(folder, max_to_keep=1) as checkpoints:
    checkpoints.save(10, state(10), {})
    sys.addaudithook(count)
    for step in (20, 30):
        checkpoints.save(step, state(step), {})
    print(events)
"""


def save_until_killed(folder: Path, last_event: int) -> subprocess.CompletedProcess[str]:
    """Save three checkpoints in a process that ends at an event of the file system, without any cleanup."""
    command = [sys.executable, "-c", SAVE_UNTIL_KILLED, str(folder), str(last_event)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def num_events(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Number of folders and files that are created, renamed or deleted by two saves."""
    done = save_until_killed(tmp_path_factory.mktemp("events") / "checkpoints", 0)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


EVENTS = [(i + 0.5) / 12 for i in range(12)]


@pytest.mark.xdist_group("kill at event")
@pytest.mark.fault("R2")
@pytest.mark.parametrize(
    "fraction", [pytest.param(f, marks=() if i in (4, 9) else pytest.mark.full) for i, f in enumerate(EVENTS)]
)
def test_a_kill_within_a_save_or_a_deletion_leaves_only_intact_checkpoints(
    tmp_path: Path, num_events: int, fraction: float
) -> None:
    folder = tmp_path / "checkpoints"
    done = save_until_killed(folder, 1 + int(fraction * num_events))
    assert done.returncode == 9, done.stderr
    steps = list_steps(folder)
    assert steps
    for step in steps:
        with Checkpoints(folder, max_to_keep=None) as checkpoints:
            restored = checkpoints.restore(state(0), step=step)
        assert restored is not None and (restored.state["x"] == state(step)["x"]).all()
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        checkpoints.save(40, state(40), {})
    assert sorted(path.name for path in folder.iterdir()) == ["40"], "files of the killed process remain"


@pytest.mark.full
@pytest.mark.fault("R7", trials=100)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bits_anywhere_never_restore_a_wrong_state(tmp_path: Path) -> None:
    """Any file of the newest checkpoint has one flipped bit, at a random position."""
    intact, rng = tmp_path / "intact", random.Random(0)
    with Checkpoints(intact) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(step), {})
    for trial in range(100):
        folder = Path(shutil.copytree(intact, tmp_path / str(trial)))
        path = rng.choice([path for path in sorted(folder.glob("20/**/*")) if path.is_file() and path.stat().st_size])
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(state(0))
        assert restored is not None and (restored.state["x"] == state(restored.step)["x"]).all(), path


# Clocks and environments


@pytest.mark.fault("R24")
def test_a_clock_that_is_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mqar_micro.get_tiny()
    train(config, tmp_path / "a", name="a")
    clock = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    train(config, tmp_path / "b", name="b")
    monkeypatch.undo()
    seconds = [row["seconds"] for row in read_log(tmp_path / "b/log.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] < 600
    (step,) = {list_steps(tmp_path / name / "checkpoints")[-1] for name in "ab"}
    assert leaf_checksums(tmp_path / "a", step) == leaf_checksums(tmp_path / "b", step)


@pytest.mark.fault("R18")
def test_a_run_does_not_depend_on_the_environment(tmp_path: Path) -> None:
    arguments = [argument.replace("steps=1", "steps=3") for argument in ONE_STEP]
    variants = {
        "a": {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"},
        "b": {"PYTHONHASHSEED": "42", "TZ": "Asia/Kathmandu", "LC_ALL": "C.UTF-8", "LANGUAGE": "tr"},
    }
    for name, environment in variants.items():
        command = [sys.executable, "-m", "recallax", "train", *arguments, "--run", str(tmp_path / name)]
        (tmp_path / f"folder {name}").mkdir()
        path = {"PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run(
            command,
            cwd=tmp_path / f"folder {name}",
            env={**os.environ, **path, **environment},
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert leaf_checksums(tmp_path / "a", 3) == leaf_checksums(tmp_path / "b", 3)


def leaf_checksums(run: Path, step: int) -> Any:
    return read_description(run / "checkpoints" / str(step))["leaves"]


# Networks and secrets


@pytest.fixture(scope="module")
def isolated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, trained without a network and with a secret in its environment."""
    folder = tmp_path_factory.mktemp("isolated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_API_TOKEN", SECRET)
        with sockets_raise():
            assert main(["train", *ONE_STEP, "--run", str(folder)]) == 0
    return folder


class sockets_raise:
    """Context manager in which connecting a socket, resolving a name and listening on a port raise an error."""

    active = False
    has_hook = False

    def __enter__(self) -> None:
        if not sockets_raise.has_hook:
            sys.addaudithook(sockets_raise.check)  # it can not be removed
            sockets_raise.has_hook = True
        sockets_raise.active = True

    def __exit__(self, *_: object) -> None:
        sockets_raise.active = False

    @staticmethod
    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if sockets_raise.active and event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
            raise PermissionError(f"a command must not use the network: {event} {arguments}")


@pytest.mark.xdist_group("isolated run")
@pytest.mark.fault("S8", "S11")
@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["show", "mqar_micro"],
        ["doctor"],
        ["eval", "RUN", "--batches", "1"],
        ["generate", "RUN", "--task-rows", "1"],
        ["export", "RUN", "--to", "safetensors", "--out", "OUT/weights"],
        ["report", "RUN", "--out", "OUT/report.html"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_work_without_a_network_and_open_no_port(
    isolated_run: Path, tmp_path: Path, arguments: list[str]
) -> None:
    call = [argument.replace("RUN", str(isolated_run)).replace("OUT", str(tmp_path)) for argument in arguments]
    with sockets_raise():
        assert main(call) == 0


@pytest.mark.fault("S11")
def test_a_coordinator_on_the_loopback_address_listens_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("recallax.train.distributed.filter_standard_error", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **named: calls.append(named))
    Distributed(coordinator_address="127.0.0.1:1234", num_processes=2, process_id=0).initialize()
    assert calls[0]["coordinator_bind_address"] == "127.0.0.1:1234"


@pytest.mark.xdist_group("isolated run")
@pytest.mark.fault("S13")
def test_no_file_of_a_run_has_the_environment(isolated_run: Path, tmp_path: Path) -> None:
    assert main(["report", str(isolated_run), "--out", str(tmp_path / "report.html")]) == 0
    files = [path for folder in (isolated_run, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


# Files


@pytest.mark.fault("S15")
def test_an_existing_temporary_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of temporary files are random; even a name that was guessed is not used if it exists."""
    names: list[str] = []
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(Path(source).name))
    write_atomic(tmp_path / "file", "text")
    write_atomic(tmp_path / "file", "text")
    assert len(set(names)) == 2
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr("recallax.atomic_files.secrets.token_hex", lambda size: "guessed")
    (tmp_path / ".file.guessed.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file", "text")
    assert (tmp_path / "precious").read_text() == "precious"
