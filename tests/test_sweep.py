"""The sweep runner with local processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recallax.cli.main import main
from recallax.config import ConfigError, fingerprint
from recallax.sweep import (
    Backend,
    LocalBackend,
    encode_row,
    load_stages,
    process_signals,
    read_results,
    refine_learning_rates,
    run_sweep,
)
from recallax.sweep.backends.backend import EXIT_IN_USE
from recallax.sweep.backends.local import visible_gpus
from recallax.sweep.display import SweepDisplay
from recallax.sweep.process_signals import interrupted_by_signals
from recallax.sweep.results import add_extra_metrics
from recallax.sweep.worker import run_worker
from recallax.train.log import available_cores, read_log
from recallax.train.run_folder import RunFolder
from recallax.train.stop_signals import Interrupted

FILE = """
import os
from dataclasses import replace
from pathlib import Path
from recallax.configs import mqar_micro
from recallax.train.curriculum.stages import AfterSteps, Curriculum, Stage
from recallax.train.run_config import AdamW
from recallax.sweep import Trial, refine_learning_rates

OUT = Path(__file__).parent


def trial(rate):
    config = replace(mqar_micro.get_tiny(), optim=AdamW(lr=rate))
    if rate == 0.02:
        stages = Stage(name="embedding", frozen=("*.mixer.*",), until=AfterSteps(steps=2)), Stage(name="all")
        config = replace(config, curriculum=Curriculum(stages=stages))
    return Trial({"stage": "grid", "lr": rate}, config, extra_metrics)


def extra_metrics(program, state):
    if program.config.optim.lr == 0.5 and not (OUT / "repaired").exists():
        os.kill(os.getpid(), 9)
    return {"steps": int(state.step)}


def grid(rows):
    return [trial(rate) for rate in (0.01, 0.02)]


def refined(rows):
    accuracies = {row["lr"]: -row["lr"] for row in rows}  # as if the smallest were the best
    return [trial(rate) for rate in refine_learning_rates(accuracies)] if len(accuracies) == 2 else []


STAGES = (grid, refined)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.py"
    path.write_text(FILE)
    return path


def test_every_trial_gets_a_run_folder_and_a_row(
    file: Path, tmp_path: Path, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 0
    rows = read_results(out)
    assert [row["lr"] for row in rows.values()] == [
        0.01,
        0.02,
        0.005,
        0.0141421,
    ]  # the best rate was at the edge of the grid
    for name, row in rows.items():
        assert row["config"] == name and row["steps"] == 4 and row["stage"] == "grid"
        assert {"accuracy", "loss"} <= row["test"].keys() and 0 <= row["valid"]["accuracy"] <= 1
        assert row["parameters"] > 0 and row["state_bytes"] > 0 and row["commit"]
    assert "[1/2] stage grid lr 0.01: valid accuracy" in capsys.readouterr().out
    # A second sweep has nothing to train, also if a kill truncated the results.
    results = out / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole[: len(whole) // 2])
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert sorted(results.read_text().splitlines()) == sorted(whole.splitlines())
    assert main(["report", *(str(out / name) for name in rows), "--out", str(tmp_path / "report.html")]) == 0


@pytest.mark.fault("R20", "R21")
def test_failed_trials_are_isolated_and_retried(
    tmp_path: Path, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed, as the system does if no memory is left."""
    file, out = tmp_path / "sweep.py", tmp_path / "runs"
    file.write_text(FILE.replace("(0.01, 0.02)", "(0.5, 0.01)").replace("(grid, refined)", "(grid,)"))
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("lr 0.5: failed") == 2 and "1 failed:" in printed
    assert [row["lr"] for row in read_results(out).values()] == [0.01]
    (tmp_path / "repaired").touch()
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 0
    assert sorted(row["lr"] for row in read_results(out).values()) == [0.01, 0.5]


class PreemptingBackend(Backend):
    """Backend whose worker is preempted three times and then finishes."""

    workers = 1

    def __init__(self) -> None:
        self.calls = 0

    def run(self, arguments: list[str], log: Path) -> int:
        _, out, _, name = arguments
        self.calls += 1
        if self.calls <= 3:
            return os.EX_TEMPFAIL
        (Path(out) / name).mkdir()
        (Path(out) / name / "row.json").write_text(json.dumps({"config": name, "valid": {"accuracy": 0.5}, "lr": 0}))
        return 0

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.fault("R3")
def test_preemption_does_not_count_as_failure(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text().replace("(0.01, 0.02)", "(0.01,)").replace("(grid, refined)", "(grid,)"))
    backend = PreemptingBackend()
    assert run_sweep(file, tmp_path / "runs", backend, retries=0) == 0 and backend.calls == 4
    printed = capsys.readouterr().out
    assert printed.count("lr 0.01: stopped, will be resumed") == 3 and "failed" not in printed


# Results and logs with any content


ODD_VALUES: list[Any] = [
    None,
    "nan",
    "-inf",
    "high",
    {},
    [1],
    True,
    10**400,
    1e300,
    "\x1b]0;title\x07",
    "[/x]",
    "é" * 9999,
]


class OddRowsBackend(PreemptingBackend):
    """Backend whose workers write logs and rows with unusual values."""

    def run(self, arguments: list[str], log: Path) -> int:
        _, out, _, name = arguments
        folder, value = Path(out) / name, ODD_VALUES[self.calls % len(ODD_VALUES)]
        self.calls += 1
        folder.mkdir()
        train = {"kind": "train", "step": 1, "fingerprint": name, "seconds": 1, "accuracy": value}
        without = {key: train[key] for key in train if key != "accuracy"}
        damage = b"\xff\x00<<<<<<<\n[]\n{}\n\n" + b"[" * 9999
        (folder / "log.jsonl").write_bytes(f"{json.dumps(train)}\n{json.dumps(without)}\n".encode() + damage)
        valid = value if self.calls % 2 else {"accuracy": value}
        (folder / "row.json").write_text(json.dumps({"config": name, "valid": valid}))
        time.sleep(0.01)
        return 0


@pytest.mark.fault("R21")
@pytest.mark.parametrize("terminal", [True, False])
def test_no_content_of_a_cell_ends_a_sweep(
    tmp_path: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps may be non-finite, so that a log has no accuracy; labels may contain escape sequences and styles."""
    file = tmp_path / "sweep.py"
    labels = ["\x1b]0;title\x07", "[/x]", ":smile:", "x" * 9999, "\ud800", float("nan"), float("inf"), -1, True]
    trials = f"[Trial({{'label': label}}, trial((1 + i) / 64).config) for i, label in enumerate({labels!r} * 3)]"
    text = FILE[: FILE.index("STAGES")].replace("from pathlib", "nan, inf = float('nan'), float('inf')\nfrom pathlib")
    file.write_text(f"{text}STAGES = [lambda rows: {trials}]")
    monkeypatch.setattr("recallax.sweep.runner.REFRESH_SECONDS", 0.01)
    if terminal:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run_sweep(file, tmp_path / "runs", OddRowsBackend()) == 0
    printed = capsys.readouterr().out
    assert printed.count("valid accuracy") == 27 and "valid accuracy unknown" in printed
    assert "title" in printed and "\x1b]" not in printed and "\x07" not in printed
    if terminal:
        with SweepDisplay(tmp_path / "runs") as display:
            for name in os.listdir(tmp_path / "runs"):
                display.trial_started(name, {"label": "[/x]"}, 4)
            display.trial_started("absent", {}, 4)
            display.refresh()
        printed = capsys.readouterr().out
        assert "waiting" in printed and "1/4" in printed and "[/x]" in printed


def test_rows_are_standard_json() -> None:
    row = {
        "lr": math.nan,
        "test": {"loss": np.float32(math.inf), "n": np.int64(3)},
        "norms": (0.5, -math.inf),
        "x": None,
    }
    text = encode_row(row)
    decoded = json.loads(text, parse_constant=pytest.fail)
    assert decoded == {"lr": "nan", "test": {"loss": "inf", "n": 3}, "norms": [0.5, "-inf"], "x": None}
    with pytest.raises(ConfigError, match=r"norms\.w is array.*numbers, texts"):
        encode_row({"norms": {"w": np.ones(2)}})
    with pytest.raises(ConfigError, match="cannot be encoded"):
        encode_row({"x": 10**5000})


def test_labels_and_metrics_do_not_overwrite_columns(file: Path) -> None:
    assert add_extra_metrics({"lr": 1, "valid": {}}, {"norm": 2}) == {"lr": 1, "valid": {}, "norm": 2}
    for name in ("lr", "valid"):
        with pytest.raises(ConfigError, match=f"'{name}', which the row has already; rename"):
            add_extra_metrics({"lr": 1, "valid": {}}, {name: 2})
    with pytest.raises(ConfigError, match="extra_metrics returned None"):
        add_extra_metrics({}, None)
    for label, problem in {
        "'seconds': 1": "the label 'seconds', which is the name of a column",
        "'test': 1": "the label 'test', which is the name of a column",
        "'x': [1]": "the label 'x' of type list",
        "'x': object()": "x is <object",
        "'x': 10**5000": "cannot be encoded",
        "1: 1": "labels of type dict",
    }.items():
        # The tests check the types of arguments, which users do not, so the labels are set later.
        file.write_text(f"{FILE}\nodd = trial(0.1)\nvars(odd)['labels'] = {{{label}}}\nSTAGES = [lambda rows: [odd]]")
        with pytest.raises(ConfigError, match=f"returned a trial with .*{problem}"):
            load_stages(file)[0]([])


@pytest.mark.fault("R22")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"\n{}\n", 2),
        (b'{"config": "a"}\n[]\n', 2),
        (b'{"config": 1}\n', 1),
        (b'\xef\xbb\xbf{"config": "a"}\n\n<<<<<<< ours\n', 3),
        ('{"config": "a"}\n'.encode("utf-16"), 1),
        (b'{"config": "a", "le\n', 1),
        (b"\x00" * 99 + b"\n", 1),
        (b'{"config": "a", "config": "b"}\n', 1),
    ],
)
def test_damaged_results_are_one_line_errors(
    file: Path, tmp_path: Path, text: bytes, line: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/results.jsonl").write_bytes(text)
    assert main(["sweep", str(file), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"runs/results.jsonl line {line} is not a row: " in error
    assert (tmp_path / "runs/results.jsonl").read_bytes() == text


@pytest.mark.fault("R22")
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"config": 1}', b"\xff", b"<<<<<<< ours\n"])
def test_damaged_row_is_a_one_line_error(
    file: Path, tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/name").mkdir(parents=True)
    (tmp_path / "runs/name/row.json").write_bytes(text)
    assert main(["sweep", str(file), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs/name/row.json is not a row: " in error and "remove it" in error


def test_blank_lines_and_byte_order_marks_of_results_are_skipped(tmp_path: Path) -> None:
    rows = '\ufeff{"config": "a"}\r\n\n  \n{"config": "b", "x": NaN}\n{"config": "trunc'
    (tmp_path / "results.jsonl").write_text(rows, encoding="utf-8", newline="")
    assert list(read_results(tmp_path)) == ["a", "b"]


# Signals, and processes that use the same folders


class HoldingBackend(PreemptingBackend):
    """Backend whose workers find the folders in use, as worker processes do if the sweep cannot see the locks."""

    def run(self, arguments: list[str], log: Path) -> int:
        if self.calls == 0:
            self.calls = 4
            return EXIT_IN_USE
        return super().run(arguments, log)


@pytest.mark.fault("R11")
def test_a_run_of_another_process_is_awaited(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first trial is finished by another process while the sweep waits; the second one is free after a while."""
    file.write_text(file.read_text().replace("(grid, refined)", "(grid,)"))
    monkeypatch.setattr("recallax.sweep.runner.REFRESH_SECONDS", 0.05)
    monkeypatch.setattr("recallax.sweep.runner.IN_USE_SECONDS", 0.0)
    out, backend = tmp_path / "runs", HoldingBackend()
    first, second = (trial.config for trial in load_stages(file)[0]([]))
    row = {"config": fingerprint(first), "valid": {"accuracy": 0.25}, "by": "another process"}
    with ThreadPoolExecutor(1) as pool:
        with RunFolder(out / fingerprint(first), first):
            assert run_worker([str(file), str(out), "0", fingerprint(first)]) == EXIT_IN_USE
            sweep = pool.submit(run_sweep, file, out, backend, retries=0)
            while fingerprint(second) not in read_results(out):
                assert not sweep.done()
                time.sleep(0.02)
            time.sleep(0.2)
            assert not sweep.done() and backend.calls == 5
            (out / fingerprint(first) / "row.json").write_text(json.dumps(row))
        assert sweep.result(timeout=10) == 0
    assert backend.calls == 5 and read_results(out)[fingerprint(first)] == row
    printed = capsys.readouterr().out
    assert printed.count(f"lr 0.01: running in process {os.getpid()} on ") == 1
    assert "failed" not in printed and printed.count("another process is running it") == 1


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt_a_sweep(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(Interrupted, match="run the same command again"), interrupted_by_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Exception:
            pytest.fail("the code of a stage must not handle it")
        finally:
            assert signal.getsignal(number) == before[number], "a second signal has its previous effect"
    assert before == {each: signal.getsignal(each) for each in before}


def test_ignored_signals_remain_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupted_by_signals().__enter__).result()  # no other thread may handle signals


CHILD = """
import importlib.util, os, sys, time, types
stub = sys.modules["recallax.train.stop_signals"] = types.ModuleType("stop_signals")
stub.Interrupted = Exception
sys.modules |= {name: types.ModuleType(name) for name in ("recallax", "recallax.train")}
spec = importlib.util.spec_from_file_location("process_signals", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.sys = types.SimpleNamespace(platform=sys.argv[2])
while sys.argv[3] == "late" and os.getppid() == int(sys.argv[4]):
    time.sleep(0.01)
module.end_with_parent(int(sys.argv[4]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
with subprocess.Popen([sys.executable, "-c", *sys.argv[1:], str(os.getpid())], stdin=subprocess.PIPE) as child:
    print(child.pid, flush=True)
"""


@pytest.mark.fault("R21")
@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_workers_end_with_a_killed_parent(platform: str, when: str) -> None:
    """The parent is killed after the child has called `end_with_parent`, or before."""
    if sys.platform != "linux" and platform == "linux":
        pytest.skip("the signal of the kernel exists on Linux only")
    module = process_signals.__file__
    command = [sys.executable, "-c", PARENT, CHILD, module, platform, when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if when == "early":
            assert int(parent.stdout.readline()) == pid
        parent.kill()
        start = time.monotonic()
        parent.stdout.read()  # ends when the child, which has inherited it, ends
    assert time.monotonic() - start < 20


@pytest.mark.fault("R3")
def test_terminated_sweep_stops_its_workers(file: Path, tmp_path: Path, compiled: None) -> None:
    """The worker saves a checkpoint, and the sweep exits with the status of a run that can be resumed."""
    changes = (
        "replace(mqar_micro.get_tiny(), optim=AdamW(lr=rate), train=replace(mqar_micro.get_tiny().train, steps=10**6))"
    )
    text = FILE.replace("replace(mqar_micro.get_tiny(), optim=AdamW(lr=rate))", changes).replace(
        "(0.01, 0.02)", "(0.01,)"
    )
    file.write_text(text)
    out = tmp_path / "runs"
    command = [sys.executable, "-m", "recallax", "sweep", str(file), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        until = time.monotonic() + 120
        while not any(out.glob("*/log.jsonl")) or '"train"' not in next(out.glob("*/log.jsonl")).read_text():
            assert sweep.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        sweep.terminate()
        printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 75 and "run the same command again to resume" in printed and "Traceback" not in printed
    assert "stopped, will be resumed" not in printed or "failed" not in printed
    folder = next(out.glob("*/log.jsonl")).parent
    assert read_log(folder / "log.jsonl")[-1]["event"] == "interrupted" and (folder / "lock").read_text() == ""


def test_results_of_an_earlier_version_count_as_finished(file: Path, tmp_path: Path) -> None:
    """Rows and folders of schema 1 have other fingerprints for the same configs."""
    backend, out = PreemptingBackend(), tmp_path / "runs"
    first, second = (trial.config for trial in load_stages(file)[0]([]))
    old_names = [fingerprint(config, schema=1) for config in (first, second)]
    assert not set(old_names) & {fingerprint(first), fingerprint(second)}
    rows = [{"config": name, "lr": 0, "valid": {"accuracy": 0.5}} for name in old_names]
    (out / old_names[1]).mkdir(parents=True)
    (out / "results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (out / old_names[1] / "row.json").write_text(json.dumps(rows[1]))
    file.write_text(file.read_text().replace("(grid, refined)", "(grid,)"))
    assert run_sweep(file, out, backend) == 0 and backend.calls == 0
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == rows


def test_file_without_stages_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="there is no sweep at"):
        load_stages(tmp_path / "none.py")
    (tmp_path / "later_part.py").write_text("TRIALS = []")
    (tmp_path / "later.py").write_text(
        "def stage(rows):\n    import later_part\n    return later_part.TRIALS\nSTAGES = [stage]"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert [stage([]) for stage in load_stages(Path("later.py"))] == [[]], "imported when the stage runs"
    (tmp_path / "empty.py").write_text("TRIALS = []")
    assert main(["sweep", str(tmp_path / "empty.py")]) == 2
    assert "has no STAGES" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", r"sweep line 1: SyntaxError: .* was never closed"),
        ("\n1 / 0", r"sweep line 2: ZeroDivisionError: division by zero"),
        ("\n\nimport absent_module", r"sweep line 3: ModuleNotFoundError: No module named 'absent_module'"),
        ("import json\njson.loads('')", r"sweep line 2 \(in .*decoder.py line \d+\): JSONDecodeError: Expecting value"),
        ("def stage(rows): return []\nSTAGES = stage", r"sweep has no STAGES; it must be a list of functions"),
        ("STAGES = [1]", r"sweep has no STAGES; it must be a list of functions"),
        ("STAGES = 7", r"sweep has no STAGES; it must be a list of functions"),
        (
            "def stage(rows):\n    return rows[0]\nSTAGES = [stage]",
            r"sweep line 2: IndexError: list index out of range",
        ),
        ("def stage(rows):\n    yield 1\n    1 / 0\nSTAGES = [stage]", r"sweep line 3: ZeroDivisionError"),
        (
            "STAGES = [lambda rows: None]",
            r"sweep: stage '<lambda>' returned a NoneType; it must return a list of Trial",
        ),
        ("STAGES = [lambda rows: [{}]]", r"sweep: stage '<lambda>' returned a dict; it must return a list of Trial"),
        ("STAGES = [lambda rows: 'text']", r"sweep: stage '<lambda>' returned a str; it must return a list of Trial"),
        (
            "from recallax.sweep import Trial\nodd = Trial.__new__(Trial)\nvars(odd)['config'] = None\n"
            "STAGES = [lambda rows: [odd]]",
            "returned a trial with a config of type NoneType; it must be a RunConfig",
        ),
        (
            "from recallax.train import AdamW\nSTAGES = [\n  lambda rows: [AdamW(lr=-1.0)]]",
            r"sweep line 3: optim\.lr is -1",
        ),
        ("\x00", "sweep.*: SyntaxError"),
    ],
)
def test_wrong_sweep_files_are_one_line_errors(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has no suffix `.py`, and is executed all the same."""
    (tmp_path / "sweep").write_text(text)
    assert main(["sweep", str(tmp_path / "sweep"), "--out", str(tmp_path / "runs"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    with pytest.raises(ConfigError, match="retries is -1; it must be at least 0"):
        run_sweep(tmp_path / "sweep", tmp_path / "runs", PreemptingBackend(), retries=-1)


def test_accuracies_that_are_not_finite_are_below_all_others() -> None:
    for odd in (math.nan, "nan", "inf", None):
        assert refine_learning_rates({0.1: 0.3, 0.2: odd, 0.4: 0.2}) == refine_learning_rates(
            {0.1: 0.3, 0.2: 0.0, 0.4: 0.2}
        )
    assert refine_learning_rates({0.1: "nan", 0.2: math.nan}) == ()


def test_refine_learning_rates_finds_the_best_rate() -> None:
    """The best rate is 3e-3, outside the grid."""
    accuracies = {rate: -abs(math.log(rate / 3e-3)) for rate in (1e-2, 2e-2, 4e-2)}
    for _ in range(10):
        next_rates = refine_learning_rates(accuracies)
        if not next_rates:
            break
        assert not set(next_rates) & accuracies.keys()
        accuracies |= {rate: -abs(math.log(rate / 3e-3)) for rate in next_rates}
    best = max(accuracies, key=lambda rate: accuracies[rate])
    assert not next_rates and abs(math.log(best / 3e-3)) < math.log(2) / 2 and len(accuracies) <= 10
    with pytest.raises(ValueError, match="begin with a grid"):
        refine_learning_rates({})


def test_local_workers_divide_cores_and_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"] and LocalBackend().workers == 2
    with pytest.raises(ConfigError, match="2 GPUs"):
        LocalBackend(3)
    backend, log = LocalBackend(1), tmp_path / "log"
    assert backend.execute(["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 3"], log) == 3
    assert log.read_text() == "2\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == [] and LocalBackend(1).workers == 1 and LocalBackend().workers == available_cores()
    for workers in (0, -1):
        with pytest.raises(ConfigError, match=f"workers is {workers}; it must be at least 1"):
            LocalBackend(workers)


def test_local_backend_starts_nothing_after_stop(tmp_path: Path) -> None:
    backend, log = LocalBackend(1), tmp_path / "log"
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(backend.execute, ["sh", "-c", "echo started; exec sleep 60"], log)
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        backend.stop()
        assert status.result(timeout=10) == -signal.SIGTERM
    assert backend.execute(["sh", "-c", "echo again"], log) == os.EX_TEMPFAIL
    assert log.read_text() == "started\n"
