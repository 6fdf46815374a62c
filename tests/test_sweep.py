"""The sweep runner with local processes."""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recallax.cli.main import main
from recallax.config import ConfigError, fingerprint
from recallax.sweep import Backend, LocalBackend, load_stages, read_results, refine_learning_rates, run_sweep
from recallax.sweep.backends.local import visible_gpus
from recallax.train.log import available_cores

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


def test_failed_trials_are_isolated_and_retried(
    tmp_path: Path, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed, as by the system when there is no memory left."""
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
    """Workers are preempted three times, and then finish."""

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


def test_a_preempted_run_has_not_failed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text().replace("(0.01, 0.02)", "(0.01,)").replace("(grid, refined)", "(grid,)"))
    backend = PreemptingBackend()
    assert run_sweep(file, tmp_path / "runs", backend, retries=0) == 0 and backend.calls == 4
    printed = capsys.readouterr().out
    assert printed.count("lr 0.01: stopped, will be resumed") == 3 and "failed" not in printed


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


def test_a_file_without_stages_is_refused(
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
