"""Faults while training: frozen states, interrupted log rows, loss spikes, hangs, exhausted memory and full disks."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.cli.main import main
from recallax.config import ConfigError, fingerprint
from recallax.configs import mqar_micro
from recallax.report import write_report
from recallax.sweep import read_results, run_sweep
from recallax.sweep.backends.local import LocalBackend
from recallax.tasks import MQAR
from recallax.train import loop, resource_checks, watchdog
from recallax.train.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from recallax.train.continuation import continue_run
from recallax.train.log import LogRow, read_log
from recallax.train.loop import train
from recallax.train.loss_spikes import MIN_STEPS, WINDOW_STEPS, LossSpike, LossSpikes
from recallax.train.metrics_logger import MetricsLogger, NonFiniteError
from recallax.train.program import Program
from recallax.train.resource_checks import OutOfMemoryError
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import RunFolderError
from recallax.train.step import MAX_NONFINITE_STREAK
from recallax.train.stop_signals import StopSignals
from recallax.train.watchdog import EXIT_HUNG

TINY = mqar_micro.get_tiny()
CONFIG = replace(
    TINY,
    train=replace(TINY.train, steps=24, log_every=5, save_every=4),
    evaluate=replace(TINY.evaluate, every=1000),
)
PROGRAMS: dict[str, Program] = {}


@pytest.fixture(autouse=True)
def compile_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setattr(loop, "Program", lambda config: PROGRAMS.setdefault(fingerprint(config), Program(config)))
    monkeypatch.setattr("recallax.cli.train.load_config", lambda _: CONFIG)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def with_train(**fields: Any) -> RunConfig:
    return replace(CONFIG, train=replace(CONFIG.train, **fields))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


def comparable_rows(folder: Path) -> list[LogRow]:
    """Return the rows that a resumed run shares with an uninterrupted one, without times."""
    rows = [row for row in read_log(folder / "log.jsonl") if row["kind"] != "run"]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")}
        for row in rows
        if row.get("event") != "interrupted"
    ]


@pytest.fixture
def bad_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Indices of train batches whose weights are NaN."""
    make_batch, bad = MQAR.batch, set[int]()

    def batch(self: MQAR, seed: int, split: Any, index: int, size: int) -> Any:
        batch = make_batch(self, seed, split, index, size)
        if split == "train" and index in bad:
            batch.weights[:] = np.nan
        return batch

    monkeypatch.setattr(MQAR, "batch", batch)
    yield bad


# Frozen states


@pytest.fixture
def frozen(tmp_path: Path, bad_batches: set[int]) -> Path:
    """A run whose batches from number 9 on are not finite."""
    bad_batches.update(range(9, 24))
    with pytest.raises(NonFiniteError, match=rf"up to step 2[01]: .*--from {tmp_path}/run@8 --optim\.lr"):
        train(CONFIG, tmp_path / "run")
    bad_batches.clear()
    return tmp_path / "run"


@pytest.mark.fault("R12")
def test_a_frozen_state_is_not_saved_and_the_run_resumes_before_it(frozen: Path) -> None:
    assert steps(frozen) == [4, 8], "12, 16 and 20 are in the streak and would evict sound checkpoints"
    assert read_log(frozen / "log.jsonl")[-1]["event"] == "non-finite"
    train(CONFIG, frozen)  # the batches are repaired
    starts = [row["step"] for row in read_log(frozen / "log.jsonl") if row["kind"] == "run"]
    assert starts == [0, 8] and steps(frozen) == [20, 24]


def test_a_streak_that_is_older_than_the_first_checkpoint_is_saved(tmp_path: Path, bad_batches: set[int]) -> None:
    """The log has steps beyond `save_every`, so that without a checkpoint the run could not be started again."""
    bad_batches.update(range(2, 24))
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            train(CONFIG, tmp_path / "run")
        assert steps(tmp_path / "run") == [4]


@pytest.mark.fault("R12")
def test_checkpoints_of_frozen_states_are_skipped(tmp_path: Path) -> None:
    """Earlier versions wrote them, and could not resume from them."""
    folder, program = tmp_path / "run", Program(CONFIG)
    train(CONFIG, folder)
    with Checkpoints(folder / "checkpoints", 3) as checkpoints:
        restored = checkpoints.restore(program.abstract_state)
        assert restored is not None
        state = restored.state._replace(streak=jnp.int32(MAX_NONFINITE_STREAK), step=jnp.int32(26))
        checkpoints.save(26, state, restored.metadata)
        with pytest.warns(CheckpointWarning, match=r"26 is damaged .* frozen after 10 non-finite steps in a row"):
            train(CONFIG, folder)
    assert steps(folder) == [20, 24]


def test_a_run_continues_under_a_changed_optimizer(frozen: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["train", "mqar_micro", "--from", f"{frozen}@8", "--optim.lr", "1e-3", "--run", str(tmp_path / "new")]
    assert main(command) == 0
    assert f"continuing {frozen} from step 8 of 24" in capsys.readouterr().out
    run, event, *rows = read_log(tmp_path / "new/log.jsonl")
    assert run["kind"] == "run" and (event["event"], event["step"]) == ("continued", 8)
    assert (event["run"], event["run_fingerprint"]) == (str(frozen), fingerprint(CONFIG))
    assert event["changes"] == f"optim.lr: {CONFIG.optim.lr} -> 0.001"
    assert [row["step"] for row in rows if row["kind"] == "train"] == [10, 15, 20, 24]
    assert all(row["skipped"] == 0 for row in rows if row["kind"] == "train")
    assert steps(frozen) == [4, 8] and steps(tmp_path / "new") == [20, 24]
    assert main(command) == 0, "the same command opens the run again"
    assert sum(row.get("event") == "continued" for row in read_log(tmp_path / "new/log.jsonl")) == 1
    command[3] = f"{frozen}@4"
    assert main(command) == 2 and "continues step 8 of" in capsys.readouterr().err


def test_a_continued_run_that_changes_nothing_equals_the_run(tmp_path: Path) -> None:
    train(with_train(max_to_keep=10), tmp_path / "run")
    other = with_train(max_to_keep=10, save_every=12)
    continue_run(tmp_path / "run", 12, Program(other), tmp_path / "new")
    train(other, tmp_path / "new")
    leaves = [
        json.loads((tmp_path / name / "checkpoints/24/meta/metadata").read_text())["body"]["leaves"]
        for name in ("run", "new")
    ]
    assert leaves[0] == leaves[1]
    with pytest.raises(RunFolderError, match=r"has no checkpoint of step 5; it has \[4, 8, 12, 16, 20, 24\]"):
        continue_run(tmp_path / "run", 5, Program(other), tmp_path / "refused")
    with pytest.raises(ConfigError, match="must be above 24"):
        continue_run(tmp_path / "run", None, Program(other), tmp_path / "refused")
    wider = replace(CONFIG, task=replace(CONFIG.task, vocab_size=2 * CONFIG.task.vocab_size))
    with pytest.raises(ConfigError, match=r"(?s)may change fields of optim.*\n  task\.vocab_size"):
        continue_run(tmp_path / "run", 4, Program(wider), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# Rows of the log, and loss spikes


@pytest.fixture
def spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the logged loss of the steps 15 and 16."""
    step = Program.step

    def scaled(self: Program, state: Any, *rest: Any) -> Any:
        index = int(state.step)
        state, metrics = step(self, state, *rest)
        return state, metrics._replace(loss=metrics.loss * 100) if index in (14, 15) else metrics

    monkeypatch.setattr(Program, "step", scaled)


@pytest.mark.fault("R22")
@pytest.mark.parametrize("kills", [(7,), (14, 6), (18,)], ids=str)
@pytest.mark.parametrize("graceful", [False, True], ids=["kill", "signal"])
def test_the_log_of_a_resumed_run_equals_that_of_an_uninterrupted_run(
    kills: tuple[int, ...],
    graceful: bool,
    spikes: None,
    bad_batches: set[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoints are not at the steps of rows; one step is skipped, and one spike of two steps is logged."""
    bad_batches.add(6)
    train(CONFIG, tmp_path / "whole")
    expected = comparable_rows(tmp_path / "whole")
    add, folder = MetricsLogger.add, tmp_path / "run"
    for kill in kills:
        left = [None] * kill

        def stop(self: Any, report: Any, batch: Any, left: list[None] = left) -> None:
            add(self, report, batch)
            left.pop()
            if not left and not graceful:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, loop.Interrupted)):
            patch.setattr(MetricsLogger, "add", stop)
            patch.setattr(loop.StopSignals, "stop_requested", lambda self, step, left=left: not left)
            train(CONFIG, folder)
    train(CONFIG, folder)
    assert comparable_rows(folder) == expected
    events = [(row["event"], row["step"]) for row in expected if row["kind"] == "event"]
    assert events == [("loss-spike", 15)]


@pytest.mark.fault("R13")
def test_spikes_are_relative_to_the_running_median() -> None:
    spikes = LossSpikes()
    assert [spikes.add(1.0) for _ in range(MIN_STEPS - 1)] == [None] * (MIN_STEPS - 1)
    assert spikes.add(100.0) is None, "too few steps"
    assert spikes.add(9.9) is None
    assert spikes.add(10.1) == LossSpike(10.1, 1.0)
    assert spikes.add(50.0) is None, "the same spike"
    assert spikes.add(1.0) is None and spikes.add(11.0) is not None, "another one"
    restored = LossSpikes(spikes.to_json())
    assert restored.add(1.0) is spikes.add(1.0) is None and restored.add(30.0) == spikes.add(30.0) is not None
    for _ in range(WINDOW_STEPS):
        assert spikes.add(1e-4) is None
    assert spikes.add(0.09) is None, "a single wrong answer"
    assert spikes.add(0.2) == LossSpike(0.2, 1e-4)


@pytest.mark.fault("R13")
def test_the_report_shows_spikes(tmp_path: Path, spikes: None) -> None:
    train(CONFIG, tmp_path / "run", name="spiky")
    write_report([tmp_path / "run"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    section = page[page.index("<h2>Events</h2>") :]
    assert "<td>spiky</td><td>15</td><td>loss-spike</td>" in section and "median " in section


# Hangs

HANG = """
import ctypes, sys, time
from recallax.train.stop_signals import StopSignals
from recallax.train.watchdog import Watchdog

def hang():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # like a hang in XLA: without the GIL, and not interrupted by signals

with StopSignals(), Watchdog(float(sys.argv[1]) or None) as watchdog:
    watchdog.step_starts("program")
    time.sleep(1)  # the first step is not limited
    watchdog.step_finished()
    print("ready", flush=True)
    hang()
"""


@pytest.mark.fault("R14")
@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_hang_is_ended_by_the_watchdog_or_a_second_signal(number: signal.Signals | None) -> None:
    command = [sys.executable, "-c", HANG, "0.5" if number is None else "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # it hangs by then
        start = time.monotonic()
        if number is not None:
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(number)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - start < 10
    if number is None:
        assert process.returncode == EXIT_HUNG and "made no progress for" in error and "in hang" in error
    else:
        assert process.returncode == 128 + number and "ended by a second signal" in error


def test_another_signal_soon_after_the_first_does_not_end_the_process() -> None:
    """SIGTERM of a scheduler and SIGINT of a parent that received it mean the same; a repeated SIGINT does not."""
    stopped = False
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        assert not signals.stop_requested(0)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        stopped = signals.stop_requested(0)
        signal.raise_signal(signal.SIGINT)
    assert stopped, "the first SIGINT counted as a second signal"


def test_the_limit_follows_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = watchdog.Watchdog(60.0)
    limits = []
    for seconds in (100.0, 1.0, 9.0, 9.0, 9.0):
        dog.step_starts("program")
        clock[0] += seconds
        limits.append(dog._limit)
        dog.step_finished()
    assert limits == [None, 200.0, 60.0, 60.0, 90.0] and dog._limit == 90.0
    with dog.pause():
        assert dog._limit == watchdog.PAUSE_SECONDS
    assert dog._limit == 90.0
    dog.step_starts("another program")
    assert dog._limit is None, "it is compiled"


SILENT_SWEEP = """
import sys, time
from dataclasses import replace
from tests.test_training_faults import TINY
from recallax.sweep import Trial
from recallax.tasks import MQAR

sys.modules["__main__"].HANG_SECONDS = 1.0
make_batch = MQAR.batch

def batch(self, seed, split, index, size):
    if split == "train" and seed == 1 and index == 3:
        time.sleep(1000)
    return make_batch(self, seed, split, index, size)

MQAR.batch = batch
configs = [replace(TINY, train=replace(TINY.train, data_seed=seed)) for seed in (1, 0)]
STAGES = [lambda rows: [Trial({"seed": config.train.data_seed}, config) for config in configs]]
"""


@pytest.mark.fault("R14", "R21")
def test_a_sweep_ends_a_silent_cell_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MQAR, "batch", MQAR.batch)  # the sweep file replaces it in this process too
    monkeypatch.setattr(sys.modules["__main__"], "HANG_SECONDS", 60.0, raising=False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    (tmp_path / "sweep.py").write_text(SILENT_SWEEP)
    with contextlib.closing(LocalBackend(workers=2)) as backend:
        assert run_sweep(tmp_path / "sweep.py", tmp_path / "out", backend, retries=0) == 1
    (row,) = read_results(tmp_path / "out").values()
    assert row["seed"] == 0
    (log,) = [path.read_text() for path in (tmp_path / "out").glob("*.log") if path.stem != row["config"]]
    assert "training made no progress for" in log and "in batch" in log


# Memory and disk


@pytest.mark.fault("R20")
def test_exhausted_memory_of_the_device_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Program, "step", lambda *_: jnp.zeros(2**42).block_until_ready())
    assert main(["train", "mqar_micro", "--run", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory on the device: a request of 1.638e+04 GiB failed; lower train.batch_size (8)" in line
    assert "raise train.gradient_accumulation_steps (1), set model.remat to block" in line


@pytest.mark.fault("R20")
def test_exhausted_memory_of_the_host_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MQAR, "batch", lambda *_: np.empty(2**57))
    with pytest.raises(
        OutOfMemoryError, match=r"the host: .*Unable to allocate 1\.00 EiB.*; lower train\.batch_size \(8\)"
    ):
        train(CONFIG, tmp_path / "run")


@pytest.mark.fault("R20")
@pytest.mark.parametrize("part", ["state", "step"])
def test_memory_is_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def step(*_: Any) -> None:
        raise AssertionError("a step has started")

    program = Program(CONFIG)
    memory, state = program.step_memory(program.batch(0), 0), resource_checks._state_bytes(program, per_device=True)
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert needed > state
    limit = state - 1 if part == "state" else needed
    monkeypatch.setattr(resource_checks, "available_host_bytes", lambda: limit)
    monkeypatch.setattr(Program, "step", step)
    with pytest.raises(OutOfMemoryError, match=r"on the host: .* need .*iB, and .* are available; lower train\.batch"):
        train(CONFIG, tmp_path / "run")
    assert (tmp_path / "run").exists() == (part == "step"), "the state is checked before the folder is created"


def test_the_check_does_not_compile_the_step_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = with_train(seed=9)
    with jax.log_compiles():
        train(config, tmp_path / "run")
    assert sum("Finished XLA compilation of jit(step)" in message for message in caplog.messages) == 1


@pytest.mark.fault("R9")
def test_disk_space_is_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = resource_checks._state_bytes(Program(CONFIG), per_device=False)
    usage = SimpleNamespace(free=3 * size)
    monkeypatch.setattr(resource_checks.shutil, "disk_usage", lambda _: usage)
    train(with_train(steps=8), tmp_path / "run")
    usage.free = 3 * size - 1
    with pytest.raises(CheckpointError, match=r"iB of free disk space, but 3 checkpoints of .*; .* train\.max_to_keep"):
        train(with_train(steps=8), tmp_path / "other")
    assert train(with_train(steps=8), tmp_path / "run"), "a finished run writes no checkpoint"


def test_available_memory_is_read() -> None:
    available = resource_checks.available_host_bytes()
    assert available is None or 2**20 < available < 2**50


def test_the_cache_of_files_counts_as_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource_checks, "CONTROL_GROUP", tmp_path)
    for name, text in {
        "memory.max": "1000000\n",
        "memory.current": "990000\n",
        "memory.stat": "anon 290000\nactive_file 400000\ninactive_file 300000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert resource_checks.available_host_bytes() == 710000
    (tmp_path / "memory.max").write_text("max\n")
    assert resource_checks.available_host_bytes() != 710000
