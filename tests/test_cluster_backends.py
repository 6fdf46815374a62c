"""Sweeps on a Ray cluster and on SLURM's queue: what runs there, and what becomes of a run that is killed or yields.

Ray is a cluster on this machine. SLURM is submitit's own executor for one machine, and for what is asked of SLURM
itself, programs of the same names that write down how they were called.
"""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from recallax.__main__ import main
from recallax.config import ConfigError
from recallax.sweep.backends.factory import BackendName, ResourceOptions, make_backend
from recallax.sweep.backends.ray import RayBackend, required_resources
from recallax.sweep.backends.slurm import SlurmBackend, SlurmJobOptions
from recallax.sweep.runner import read_results, sweep
from recallax.train.log import read_log

# Ray and submitit fork; where an earlier test of this process began to compute, JAX warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

FILE = """
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from recallax.configs import mqar_micro
from recallax.tasks import MQAR
from recallax.train.run_config import AdamW, Evaluate
from recallax.sweep.runner import Cell

HERE = Path(__file__).parent


def first(name):
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def cell(rate, **changes):
    tiny = mqar_micro.get_tiny()
    train = replace(tiny.train, log_every=1, save_every=1, **changes)
    config = replace(tiny, optim=AdamW(lr=rate), train=train, evaluate=Evaluate(every=9, batches=1, batch_size=4))
    return Cell({"lr": rate}, config, lambda program, state: {"pid": os.getpid()})


IN_A_CELL = str(os.getpid()) != (HERE / "driver").read_text()
"""
ON_RAY = """
if IN_A_CELL:
    (HERE / f"worker-{os.getpid()}").touch()
    until = time.monotonic() + 60
    while len(list(HERE.glob("worker-*"))) < 2:  # both workers are at it together, or neither gets on
        assert time.monotonic() < until
        time.sleep(0.01)
    while (HERE / "forever").exists():
        time.sleep(0.05)
    if first("crashed"):
        os.kill(os.getpid(), signal.SIGKILL)

STAGES = [lambda rows: [cell(rate, steps=1) for rate in (0.01, 0.02)]]
"""
ON_SLURM = """
if IN_A_CELL and first("killed"):
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_taken(number, before):  # the loop takes one signal of a number, and leaves the next to Python
    until = time.monotonic() + 60
    while signal.getsignal(number) == before[number]:
        assert time.monotonic() < until
        time.sleep(0.01)


@dataclass(frozen=True, kw_only=True)
class Yields(MQAR):
    def batch(self, seed, split, index, size):
        if (split, index) == ("train", 2) and first("yielded"):
            for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):  # SLURM signals every process of a job
                taken = {other: signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)}
                os.kill(os.getpid(), number)
                if number == signal.SIGTERM:
                    wait_until_taken(number, taken)
                os.kill(os.getppid(), number)
            wait_until_taken(signal.SIGINT, taken)
        return super().batch(seed, split, index, size)


def stage(rows):
    yielding = cell(0.01, steps=4)
    task = yielding.config.task
    task = Yields(vocab_size=task.vocab_size, mixture=task.mixture, test_mixture=task.test_mixture)
    return [replace(yielding, config=replace(yielding.config, task=task))]


STAGES = [stage]
"""


@pytest.fixture
def ray_at_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray's files in a folder that goes with the test; a short one, since its sockets' paths may have 107 bytes."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would leave a token in the user's home
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield


def write(folder: Path, stages: str) -> Path:
    (folder / "driver").write_text(str(os.getpid()))
    (folder / "sweep.py").write_text(FILE + stages)
    return folder / "sweep.py"


def test_two_workers_of_a_ray_cluster(
    tmp_path: Path, compiled: None, ray_at_home: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """They work at once; one is killed, which the other does not notice, and its run is done again; a stop is seen."""
    file, out = write(tmp_path, ON_RAY), tmp_path / "runs"
    with closing(RayBackend(cpus=1, workers=2)) as backend:
        assert sweep(file, out, backend) == 0
        told = capsys.readouterr().out
        assert told.count("failed") == 1 and told.count("valid accuracy") == 2, told
        rows = read_results(out)
        assert sorted(row["lr"] for row in rows.values()) == [0.01, 0.02]
        pids = {row["pid"] for row in rows.values()}
        assert len(pids) == 2 and os.getpid() not in pids, "a worker serves one run"
        assert len(list(tmp_path.glob("worker-*"))) == 3
        logs = [(out / f"{name}.log").read_text() for name in rows]
        assert all("test  accuracy" in log for log in logs) and sum("worker died" in log for log in logs) == 1
        (tmp_path / "forever").touch()
        (tmp_path / "driver").unlink()  # an error where the file is read, once it is past the wait
        arguments, log = [str(file), str(out), "0", "none"], tmp_path / "log"
        assert backend.run(arguments, log) == 1 and "FileNotFoundError" in log.read_text()
        write(tmp_path, ON_RAY)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(backend.run, arguments, log)
            while len(list(tmp_path.glob("worker-*"))) < 4:
                time.sleep(0.05)
            backend.stop()
            try:
                assert running.result(timeout=30) == os.EX_TEMPFAIL
            finally:
                (tmp_path / "forever").unlink()
        assert backend.run(arguments, log) == os.EX_TEMPFAIL, "nothing starts after a stop"


def test_killed_or_preempted_job_resumes(
    tmp_path: Path, compiled: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill is a failure of the one that is allowed; yielding is none, and submitit puts the run back by itself."""
    file, out = write(tmp_path, ON_SLURM), tmp_path / "runs"
    backend = SlurmBackend(SlurmJobOptions(minutes=5), out / "slurm", workers=1, executor="local")
    monkeypatch.setattr("submitit.Job._results_timeout_s", 0)  # how long a slow file system may take
    assert sweep(file, out, backend, retries=1) == 0
    assert (tmp_path / "killed").exists() and (tmp_path / "yielded").exists()
    told = capsys.readouterr().out
    assert told.count("failed") == 1 and told.count("valid accuracy") == 1, told
    ((name, row),) = read_results(out).items()
    log = read_log(out / name / "log.jsonl")
    stops = [entry["step"] for entry in log if entry["kind"] == "event" and entry["event"] == "interrupted"]
    starts = [entry["step"] for entry in log if entry["kind"] == "run"]
    assert len(stops) == 1 and starts == [0, *stops] and 2 <= stops[0] <= 3
    assert [entry["step"] for entry in log if entry["kind"] == "train"] == [1, 2, 3, 4] and row["skipped"] == 0
    text = (out / f"{name}.log").read_text()
    assert "has not produced any output" in text and f"stopped at step {stops[0]}" in text
    backend.stop()
    assert backend.run([str(file), str(out), "0", name], tmp_path / "log") == os.EX_TEMPFAIL


def test_slurm_submission_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in {
        "srun": "",
        "sbatch": f'cp "$1" {tmp_path}/script; echo Submitted batch job 17',
        "sacct": "echo 'JobID|State'; echo '17|PENDING'",
        "scancel": f'echo "$@" >{tmp_path}/cancelled',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = ResourceOptions(
        partition="long", minutes=90, cpus=4, gpus=2.0, memory=32.0, extra=("account=ours", "constraint=h100")
    )
    backend = make_backend("slurm", None, asked, tmp_path / "runs")
    assert backend.workers == 64
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(backend.run, ["file", "out", "0", "name"], tmp_path / "log")
        while not (tmp_path / "script").exists():
            time.sleep(0.01)
        backend.stop()
        assert waiting.result(timeout=10) == os.EX_TEMPFAIL
    assert (tmp_path / "cancelled").read_text() == "17\n"
    lines = (tmp_path / "script").read_text().splitlines()
    for wanted in ("partition=long", "time=90", "cpus-per-task=4", "gpus-per-node=2", "mem=32GB", "account=ours"):
        assert f"#SBATCH --{wanted}" in lines, lines
    assert "#SBATCH --constraint=h100" in lines and any(line.startswith("#SBATCH --signal=USR2@") for line in lines)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho too many jobs >&2; exit 1\n")
    backend = make_backend("slurm", None, asked, tmp_path / "runs")
    assert backend.run(["file", "out", "0", "name"], tmp_path / "log") == 1
    assert "too many jobs" in (tmp_path / "log").read_text()


def test_wrong_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*options: str) -> str:
        assert main(["sweep", str(tmp_path / "sweep.py"), *options]) == 2
        return capsys.readouterr().err

    assert "--partition says nothing to --backend ray; leave it out, or take --backend slurm" in refusal(
        "--backend", "ray", "--partition", "long"
    )
    assert "take --backend ray or slurm" in refusal("--cpus", "2")
    assert "workers is 0" in refusal("--backend", "slurm", "--workers", "0")
    assert "it needs at least 1 and 0" in refusal("--backend", "ray", "--cpus", "0")
    assert "whole gpus" in refusal("--backend", "slurm", "--gpus", "0.5")
    assert "'account' is no option of sbatch; write name=value" in refusal("--backend", "slurm", "--extra", "account")
    assert "there is no SLURM here" in refusal("--backend", "slurm")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_lacking_extra_is_named(
    name: BackendName, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'recallax\[sweep\]'"):
        make_backend(name, None, ResourceOptions(), tmp_path)


def test_a_run_takes_an_accelerator_where_there_is_one_and_no_more_than_there_is() -> None:
    assert required_resources({"CPU": 8.0, "GPU": 2.0}, 1, None) == {"CPU": 1, "GPU": 1}
    assert required_resources({"CPU": 8.0}, 8, None) == {"CPU": 8, "GPU": 0}
    assert required_resources({"CPU": 8.0, "GPU": 2.0}, 1, 0.25)["GPU"] == 0.25
    with pytest.raises(ConfigError, match="1 GPU of 0; lower --cpus or --gpus"):
        required_resources({"CPU": 8.0}, 1, 1.0)
    with pytest.raises(ConfigError, match="9 CPU of 8"):
        required_resources({"CPU": 8.0}, 9, None)
