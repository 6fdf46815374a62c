"""Sweeps: every cell a run, and none of them lost."""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recallax.__main__ import main
from recallax.config import ConfigError
from recallax.sweep.backends.local import Backend, LocalBackend, visible_gpus
from recallax.sweep.runner import load_stages, read_results, refine_learning_rates, sweep
from recallax.train.log import available_cores

FILE = """
import os
from dataclasses import replace
from pathlib import Path
from recallax.configs import mqar_micro
from recallax.train.curriculum.stages import After, Curriculum, Stage
from recallax.train.run_config import AdamW
from recallax.sweep.runner import Cell, further_rates

OUT = Path(__file__).parent


def cell(rate):
    config = replace(mqar_micro.get_tiny(), optim=AdamW(lr=rate))
    if rate == 0.02:
        stages = Stage(name="embedding", frozen=("*.mixer.*",), until=After(steps=2)), Stage(name="all")
        config = replace(config, curriculum=Curriculum(stages=stages))
    return Cell({"stage": "grid", "lr": rate}, config, probe)


def probe(program, state):
    if program.config.optim.lr == 0.5 and not (OUT / "mended").exists():
        os.kill(os.getpid(), 9)
    return {"steps": int(state.step)}


def grid(rows):
    return [cell(rate) for rate in (0.01, 0.02)]


def further(rows):
    found = {row["lr"]: -row["lr"] for row in rows}  # as if the smallest were the best
    return [cell(rate) for rate in further_rates(found)] if len(found) == 2 else []


STAGES = (grid, further)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.py"
    path.write_text(FILE)
    return path


def test_every_cell_becomes_a_run_and_a_row(
    file: Path, tmp_path: Path, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 0
    rows = read_results(out)
    assert [row["lr"] for row in rows.values()] == [0.01, 0.02, 0.005, 0.0141421]  # the best stood at the edge
    for name, row in rows.items():
        assert row["config"] == name and row["steps"] == 4 and row["stage"] == "grid"
        assert {"accuracy", "loss"} <= row["test"].keys() and 0 <= row["valid"]["accuracy"] <= 1
        assert row["parameters"] > 0 and row["state_bytes"] > 0 and row["commit"]
    assert "[1/2] stage grid lr 0.01: valid accuracy" in capsys.readouterr().out
    # A second time there is nothing to do, also where a kill tore the results or came before the last row.
    results = out / "results.jsonl"
    whole = results.read_text()
    results.write_text(whole[: len(whole) // 2])
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 0
    assert "accuracy" not in capsys.readouterr().out
    assert sorted(results.read_text().splitlines()) == sorted(whole.splitlines())
    assert main(["report", *(str(out / name) for name in rows), "--out", str(tmp_path / "report.html")]) == 0


def test_failed_cells_are_isolated_and_retried(
    tmp_path: Path, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that is killed at once, as by the system when memory ends."""
    file, out = tmp_path / "sweep.py", tmp_path / "runs"
    file.write_text(FILE.replace("(0.01, 0.02)", "(0.5, 0.01)").replace("(grid, further)", "(grid,)"))
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 1
    told = capsys.readouterr().out
    assert told.count("lr 0.5: failed") == 2 and "1 failed:" in told
    assert [row["lr"] for row in read_results(out).values()] == [0.01]
    (tmp_path / "mended").touch()
    assert main(["sweep", str(file), "--out", str(out), "--workers", "1"]) == 0
    assert sorted(row["lr"] for row in read_results(out).values()) == [0.01, 0.5]


class Interrupting(Backend):
    """Runs are stopped by another, three times, and then finish."""

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


def test_a_run_that_was_stopped_has_not_failed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text().replace("(0.01, 0.02)", "(0.01,)").replace("(grid, further)", "(grid,)"))
    backend = Interrupting()
    assert sweep(file, tmp_path / "runs", backend, retries=0) == 0 and backend.calls == 4
    told = capsys.readouterr().out
    assert told.count("lr 0.01: stopped, and will go on") == 3 and "failed" not in told


def test_a_file_without_stages_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="there is no sweep at"):
        load_stages(tmp_path / "none.py")
    (tmp_path / "later_part.py").write_text("CELLS = []")
    (tmp_path / "later.py").write_text(
        "def stage(rows):\n    import later_part\n    return later_part.CELLS\nSTAGES = [stage]"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert [stage([]) for stage in load_stages(Path("later.py"))] == [[]], "imported when the stage runs"
    (tmp_path / "empty.py").write_text("CELLS = []")
    assert main(["sweep", str(tmp_path / "empty.py")]) == 2
    assert "has no STAGES" in capsys.readouterr().err


def test_rates_settle_around_the_best() -> None:
    """Of an accuracy with its best at 3e-3, from a grid that does not hold it."""
    found = {rate: -abs(math.log(rate / 3e-3)) for rate in (1e-2, 2e-2, 4e-2)}
    for _ in range(10):
        wanted = refine_learning_rates(found)
        if not wanted:
            break
        assert not set(wanted) & found.keys()
        found |= {rate: -abs(math.log(rate / 3e-3)) for rate in wanted}
    best = max(found, key=lambda rate: found[rate])
    assert not wanted and abs(math.log(best / 3e-3)) < math.log(2) / 2 and len(found) <= 10
    with pytest.raises(ValueError, match="begin with a grid"):
        refine_learning_rates({})


def test_cores_and_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"] and LocalBackend().workers == 2
    with pytest.raises(ConfigError, match="2 accelerators"):
        LocalBackend(3)
    backend, log = LocalBackend(1), tmp_path / "log"
    assert backend.execute(["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 3"], log) == 3
    assert log.read_text() == "2\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == [] and LocalBackend(1).workers == 1 and LocalBackend().workers == available_cores()
    for workers in (0, -1):
        with pytest.raises(ConfigError, match=f"workers is {workers}; it must be at least 1"):
            LocalBackend(workers)


def test_nothing_starts_after_a_stop(tmp_path: Path) -> None:
    backend, log = LocalBackend(1), tmp_path / "log"
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(backend.execute, ["sh", "-c", "echo begun; exec sleep 60"], log)
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        backend.stop()
        assert status.result(timeout=10) == -signal.SIGTERM
    assert backend.execute(["sh", "-c", "echo again"], log) == os.EX_TEMPFAIL
    assert log.read_text() == "begun\n"
