"""Sweeps on Ray and SLURM: results, and runs that are killed or preempted.

Ray runs as a cluster on this machine. SLURM is replaced by submitit's executor for one machine, and in the test of the
submission by scripts named sbatch, sacct and scancel that record their arguments.
"""

import ipaddress
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from recallax.cli.main import main
from recallax.config import ConfigError
from recallax.sweep import BackendName, ResourceOptions, make_backend, read_results, run_sweep
from recallax.sweep.backends.ray import RayBackend, required_resources
from recallax.sweep.backends.slurm import SlurmBackend, SlurmJobOptions
from recallax.train.log import read_log

# Ray and submitit fork. JAX warns of that if an earlier test of this process has started its threads.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

FILE = """
import gc
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from recallax.configs import mqar_micro
from recallax.tasks import MQAR
from recallax.train.run_config import AdamW, Evaluate
from recallax.train.stop_signals import StopSignals
from recallax.sweep import Trial

HERE = Path(__file__).parent


def first(name):
    try:
        (HERE / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def trial(rate, **changes):
    tiny = mqar_micro.get_tiny()
    train = replace(tiny.train, log_every=1, save_every=1, **changes)
    config = replace(tiny, optim=AdamW(lr=rate), train=train, evaluate=Evaluate(every=9, batches=1, batch_size=4))
    return Trial({"lr": rate}, config, lambda program, state: {"pid": os.getpid()})


IN_A_WORKER = str(os.getpid()) != (HERE / "driver").read_text()
"""
ON_RAY = """
if IN_A_WORKER:
    (HERE / f"worker-{os.getpid()}").touch()
    until = time.monotonic() + 60
    while len(list(HERE.glob("worker-*"))) < 2:  # wait until both workers run
        assert time.monotonic() < until
        time.sleep(0.01)
    while (HERE / "forever").exists():
        time.sleep(0.05)
    if first("crashed"):
        os.kill(os.getpid(), signal.SIGKILL)

STAGES = [lambda rows: [trial(rate, steps=1) for rate in (0.01, 0.02)]]
"""
ON_SLURM = """
if IN_A_WORKER and first("killed"):
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_handled(signals, number):
    until = time.monotonic() + 60
    while number not in signals._counter._numbers:
        assert time.monotonic() < until
        time.sleep(0.01)


@dataclass(frozen=True, kw_only=True)
class PreemptedMQAR(MQAR):
    def batch(self, seed, split, index, size):
        if (split, index) == ("train", 2) and first("preempted"):
            (signals,) = (x for x in gc.get_objects() if isinstance(x, StopSignals))
            for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):  # SLURM signals every process of a job
                os.kill(os.getpid(), number)
                if number == signal.SIGTERM:
                    wait_until_handled(signals, number)
                os.kill(os.getppid(), number)
            wait_until_handled(signals, signal.SIGINT)
        return super().batch(seed, split, index, size)


def stage(rows):
    preempted = trial(0.01, steps=4)
    task = preempted.config.task
    task = PreemptedMQAR(vocab_size=task.vocab_size, mixture=task.mixture, test_mixture=task.test_mixture)
    return [replace(preempted, config=replace(preempted.config, task=task))]


STAGES = [stage]
"""


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray with a temporary folder. Its path is short because paths of sockets have at most 107 bytes."""
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise it writes a token to the home directory
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield


def write_sweep(folder: Path, stages: str) -> Path:
    (folder / "driver").write_text(str(os.getpid()))
    (folder / "sweep.py").write_text(FILE + stages)
    return folder / "sweep.py"


def listening_addresses() -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses at which this process and its children accept connections."""
    addresses = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            connections = process.net_connections(kind="inet")
            addresses |= {ipaddress.ip_address(c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN}
    mapped = {address.ipv4_mapped for address in addresses if isinstance(address, ipaddress.IPv6Address)}
    return {a for a in addresses | mapped if a is not None and getattr(a, "ipv4_mapped", None) is None}


def test_two_workers_of_a_ray_cluster(
    tmp_path: Path, compiled: None, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers run at once. One is killed and its trial retried; the other is not affected. `stop` ends a worker."""
    file, out = write_sweep(tmp_path, ON_RAY), tmp_path / "runs"
    with closing(RayBackend(cpus=1, workers=2)) as backend:
        assert run_sweep(file, out, backend) == 0
        addresses = listening_addresses()
        assert addresses and all(address.is_loopback for address in addresses), addresses
        out_text = capsys.readouterr().out
        assert out_text.count("failed") == 1 and out_text.count("valid accuracy") == 2, out_text
        rows = read_results(out)
        assert sorted(row["lr"] for row in rows.values()) == [0.01, 0.02]
        pids = {row["pid"] for row in rows.values()}
        assert len(pids) == 2 and os.getpid() not in pids, "a worker process runs one trial"
        assert len(list(tmp_path.glob("worker-*"))) == 3
        logs = [(out / f"{name}.log").read_text() for name in rows]
        assert all("test  accuracy" in log for log in logs) and sum("worker died" in log for log in logs) == 1
        (tmp_path / "forever").touch()
        (tmp_path / "driver").unlink()  # reading the file raises an error in the worker, after its wait
        arguments, log = [str(file), str(out), "0", "none"], tmp_path / "log"
        assert backend.run(arguments, log) == 1 and "FileNotFoundError" in log.read_text()
        write_sweep(tmp_path, ON_RAY)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(backend.run, arguments, log)
            while len(list(tmp_path.glob("worker-*"))) < 4:
                time.sleep(0.05)
            backend.stop()
            try:
                assert running.result(timeout=30) == os.EX_TEMPFAIL
            finally:
                (tmp_path / "forever").unlink()
        assert backend.run(arguments, log) == os.EX_TEMPFAIL, "nothing starts after stop()"


@pytest.mark.fault("R21")
def test_killed_or_preempted_job_resumes(
    tmp_path: Path, compiled: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill counts as the one failure that is allowed. A preemption does not count: submitit queues the job again."""
    file, out = write_sweep(tmp_path, ON_SLURM), tmp_path / "runs"
    backend = SlurmBackend(SlurmJobOptions(minutes=5), out / "slurm", workers=1, executor="local")
    monkeypatch.setattr("submitit.Job._results_timeout_s", 0)  # otherwise it waits for slow file systems
    assert run_sweep(file, out, backend, retries=1) == 0
    assert (tmp_path / "killed").exists() and (tmp_path / "preempted").exists()
    out_text = capsys.readouterr().out
    assert out_text.count("failed") == 1 and out_text.count("valid accuracy") == 1, out_text
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
    resources = ResourceOptions(
        partition="long", minutes=90, cpus=4, gpus=2.0, memory=32.0, extra=("account=NAME", "constraint=h100")
    )
    backend = make_backend("slurm", None, resources, tmp_path / "runs")
    assert backend.workers == 64
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(backend.run, ["file", "out", "0", "name"], tmp_path / "log")
        while not (tmp_path / "script").exists():
            time.sleep(0.01)
        backend.stop()
        assert waiting.result(timeout=10) == os.EX_TEMPFAIL
    assert (tmp_path / "cancelled").read_text() == "17\n"
    lines = (tmp_path / "script").read_text().splitlines()
    for option in ("partition=long", "time=90", "cpus-per-task=4", "gpus-per-node=2", "mem=32GB", "account=NAME"):
        assert f"#SBATCH --{option}" in lines, lines
    assert "#SBATCH --constraint=h100" in lines and any(line.startswith("#SBATCH --signal=USR2@") for line in lines)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho too many jobs >&2; exit 1\n")
    backend = make_backend("slurm", None, resources, tmp_path / "runs")
    assert backend.run(["file", "out", "0", "name"], tmp_path / "log") == 1
    assert "too many jobs" in (tmp_path / "log").read_text()


def test_invalid_resource_options_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*options: str) -> str:
        assert main(["sweep", str(tmp_path / "sweep.py"), *options]) == 2
        return capsys.readouterr().err

    assert "--partition is not supported by --backend ray; omit it, or use --backend slurm" in refusal(
        "--backend", "ray", "--partition", "long"
    )
    assert "use --backend ray or slurm" in refusal("--cpus", "2")
    assert "workers is 0" in refusal("--backend", "slurm", "--workers", "0")
    assert "cpus is 0; it must be at least 1" in refusal("--backend", "ray", "--cpus", "0")
    assert "gpus is -1.0; it must be at least 0" in refusal("--backend", "ray", "--gpus", "-1")
    assert "gpus is 0.5; it must be a whole number" in refusal("--backend", "slurm", "--gpus", "0.5")
    assert "minutes is 0; it must be at least 1" in refusal("--backend", "slurm", "--minutes", "0")
    assert "memory is 0.0 GiB; it must be above 0" in refusal("--backend", "slurm", "--memory", "0")
    assert "'account' is not an option of sbatch; write name=value" in refusal(
        "--backend", "slurm", "--extra", "account"
    )
    assert "SLURM is not available" in refusal("--backend", "slurm")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_missing_package_is_an_error(
    name: BackendName, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'recallax\[sweep\]'"):
        make_backend(name, None, ResourceOptions(), tmp_path)


def test_resources_of_a_run_on_ray() -> None:
    assert required_resources({"CPU": 8.0, "GPU": 2.0}, 1, None) == {"CPU": 1, "GPU": 1}
    assert required_resources({"CPU": 8.0}, 8, None) == {"CPU": 8, "GPU": 0}
    assert required_resources({"CPU": 8.0, "GPU": 2.0}, 1, 0.25)["GPU"] == 0.25
    with pytest.raises(ConfigError, match="1 GPU of 0; lower --cpus or --gpus"):
        required_resources({"CPU": 8.0}, 1, 1.0)
    with pytest.raises(ConfigError, match="9 CPU of 8"):
        required_resources({"CPU": 8.0}, 9, None)
