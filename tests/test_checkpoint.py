"""Checkpoints and run folders with damaged files, full disks and concurrent jobs."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recallax.atomic_files import create_folder_atomic, replace_path, write_atomic
from recallax.config import Config
from recallax.train.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from recallax.train.run_folder import RunFolder, RunFolderError, RunFolderWarning, run_folder_name

# If one of several arrays cannot be read, orbax closes its event loop while other reads are pending.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collect_pending_reads() -> Iterator[None]:
    """Collect pending reads of orbax here, because their errors appear at collection and would hit another module."""
    yield
    gc.collect()


class State(NamedTuple):
    params: dict[str, jax.Array]
    moments: tuple[jax.Array, ...]
    key: jax.Array
    step: jax.Array


def state(step: int) -> State:
    a, b, c = jax.random.split(jax.random.key(step), 3)
    params = {"w": jax.random.normal(a, (16, 8)), "half": jax.random.normal(b, (7,), jnp.bfloat16)}
    return State(params, (jax.random.normal(c, (300, 40)), jnp.float32(-0.0)), c, jnp.int32(step))


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def bits(tree: Any) -> list[tuple[str, bytes]]:
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), np.asarray(x).tobytes()) for x in leaves]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the steps 10 and 20; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(step), {"skipped": step})
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_round_trip_is_exact(saved: Path) -> None:
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore(abstract(state(0)))
    assert restored is not None and restored.step == 20
    assert bits(restored.state) == bits(state(20))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state(20))
    assert restored.metadata["skipped"] == 20 and restored.metadata["environment"]["jax"] == jax.__version__


def test_restore_returns_none_without_checkpoints(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(abstract(state(0))) is None and checkpoints.steps() == []


FILES = (
    "state/d/*",
    "state/ocdbt.process_0/d/*",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/*",
    "meta/metadata",
    "_CHECKPOINT_METADATA",
    "**/commit_success.txt",
)
"""The files of a step as patterns, because orbax names some of them at random."""


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data), 997):
        data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.fault("R6")
@pytest.mark.parametrize("fault", [truncate, empty, flip, Path.unlink])
@pytest.mark.parametrize("pattern", FILES)
def test_damaged_checkpoint_never_restores_a_wrong_state(copy: Path, pattern: str, fault: Any) -> None:
    paths = sorted((copy / "20").glob(pattern))
    assert paths, "orbax has changed the files of a step; update FILES"
    for path in paths:
        fault(path)
    with Checkpoints(copy) as checkpoints, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # orbax ignores some faults, which are harmless
        restored = checkpoints.restore(abstract(state(0)))
        assert restored is not None and bits(restored.state) == bits(state(restored.step))
        assert restored.step == restored.metadata["skipped"] == restored.state.step
        skipped = [str(w.message) for w in caught if w.category is CheckpointWarning]
        assert len(skipped) == (restored.step == 10)
        assert (copy / "quarantine/20").is_dir() == (restored.step == 10)
        checkpoints.save(restored.step + 10, state(30), {})
        assert checkpoints.steps() == [restored.step, restored.step + 10]


@pytest.mark.fault("R7", trials=12)
def test_flipped_bits_in_arrays_are_detected(copy: Path) -> None:
    """Bits are flipped at many positions of an array file; without checksums, orbax would restore all of them."""
    with Checkpoints(copy) as checkpoints:
        target = max((copy / "20/state").glob("**/d/*"), key=lambda path: path.stat().st_size)
        data = target.read_bytes()
        for position in np.linspace(len(data) // 4, len(data) * 3 // 4, 12, dtype=int):
            target.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            with pytest.warns(CheckpointWarning, match=r"20 is damaged.*(checksum|DATA_LOSS|rror)"):
                restored = checkpoints.restore(abstract(state(0)))
            assert restored is not None and bits(restored.state) == bits(state(10))
            (copy / "quarantine/20").rename(copy / "20")


@pytest.mark.fault("R7")
def test_altered_metadata_is_detected(copy: Path) -> None:
    path = copy / "20/meta/metadata"
    path.write_text(path.read_text().replace('"skipped": 20', '"skipped": 21').replace('"skipped":20', '"skipped":21'))
    with Checkpoints(copy) as checkpoints, pytest.warns(CheckpointWarning, match="description"):
        restored = checkpoints.restore(abstract(state(0)))
    assert restored is not None and restored.metadata["skipped"] == 10


@pytest.mark.fault("R8")
def test_error_if_all_checkpoints_are_damaged(copy: Path) -> None:
    for step in (10, 20):
        for path in (copy / str(step)).glob("state/**/d/*"):
            empty(path)
    with Checkpoints(copy) as checkpoints:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"(?s)checkpoints/20: .*checkpoints/10: .*in a new folder"):
                checkpoints.restore(abstract(state(0)))
        assert checkpoints.steps() == [10, 20]


@pytest.mark.fault("R17")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(step=jnp.float32(0)), r"\.step: saved int32 \[\], expected float32 \[\]"),
        (lambda s: s._replace(params={**s.params, "w": jnp.zeros((8, 16))}), r"'w'\]: saved float32 \[16, 8\], "),
        (lambda s: s._replace(params={"w": s.params["w"]}), r"'half'\]: saved bfloat16 \[7\], expected nothing"),
        (lambda s: s._replace(moments=(*s.moments, s.step)), r"\[2\]: saved nothing, expected int32"),
        (lambda s: s._replace(key=jax.random.key(0, impl="rbg")), r"\.key: saved key<fry> \[\], expected key<rbg>"),
    ],
    ids=["dtype", "shape", "less", "more", "key"],
)
def test_state_with_another_structure_is_rejected(saved: Path, change: Any, message: str) -> None:
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(abstract(change(state(0))))
        assert checkpoints.steps() == [10, 20]


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state(step), {})
        assert checkpoints.steps() == [3, 4]
        shutil.rmtree(tmp_path / "4")
        (tmp_path / "9").symlink_to(tmp_path / "3")
        assert checkpoints.steps() == [3]
        assert not (tmp_path / "trash").exists()


@pytest.mark.fault("R2")
def test_old_step_is_unlisted_before_its_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job is killed before it can delete the old step."""
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(1, state(1), {})
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            checkpoints.save(2, state(2), {})
        assert checkpoints.steps() == [2] and (tmp_path / "trash/1/state").is_dir()
        checkpoints.save(3, state(3), {})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_reading_does_not_modify_the_folder(copy: Path) -> None:
    """A run is evaluated while its job saves a step; the newest complete step is damaged."""
    (copy / "30.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    truncate(copy / "20/meta/metadata")
    before = sorted(copy.rglob("*"))
    with Checkpoints(copy, max_to_keep=None) as checkpoints:
        with pytest.warns(CheckpointWarning, match="20 is damaged and was skipped"):
            restored = checkpoints.restore(abstract(state(0)))
        assert restored is not None and bits(restored.state) == bits(state(10))
        with pytest.raises(CheckpointError, match="step 30 was not saved"):
            checkpoints.save(30, state(30), {})
    assert sorted(copy.rglob("*")) == before
    with pytest.raises(CheckpointError, match="no checkpoint to read"):
        Checkpoints(copy / "absent", max_to_keep=None)
    assert not (copy / "absent").exists()


def test_error_if_orbax_skips_a_save(copy: Path) -> None:
    with Checkpoints(copy) as checkpoints:
        for step in (15, 20):
            with pytest.raises(CheckpointError, match=rf"step {step} was not saved.*\[10, 20\]"):
                checkpoints.save(step, state(step), {})
        with pytest.raises(TypeError, match=r"state\['lr'\] is float"):
            checkpoints.save(30, {"lr": 0.1}, {})
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(30, state(30), {"loss": float("nan")})
        assert checkpoints.steps() == [10, 20]


@pytest.mark.fault("R10")
def test_error_if_the_folder_was_removed(copy: Path) -> None:
    with Checkpoints(copy) as checkpoints:
        copy.rename(copy.with_name("elsewhere"))
        with pytest.raises(CheckpointError, match="does not exist any more"):
            checkpoints.save(30, state(30), {})
    with pytest.raises(CheckpointError, match="cannot be opened for checkpoints"):
        Checkpoints(copy.with_name("elsewhere") / "20/_CHECKPOINT_METADATA/below")


@pytest.mark.fault("R9")
def test_full_disk_fails_the_save(copy: Path) -> None:
    """A limit on the size of files simulates a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpoints(copy) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            with pytest.raises(CheckpointError, match="step 30 was not saved"):
                checkpoints.save(30, state(30), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert sorted(p.name for p in copy.iterdir()) == ["10", "20"]
        checkpoints.save(30, state(30), {})
        assert checkpoints.steps() == [20, 30]


@pytest.mark.fault("R17")
def test_changed_environment_warns(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    with Checkpoints(copy) as checkpoints, pytest.warns(CheckpointWarning, match="xla_flags"):
        assert checkpoints.restore(abstract(state(0))) is not None


@pytest.mark.fault("R15")
def test_restores_onto_other_devices(tmp_path: Path) -> None:
    """A state sharded over four devices is restored onto two and onto one, in a child process with four devices."""
    script = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from recallax.train.checkpoint import Checkpoints
def sharding(n): return NamedSharding(Mesh(np.array(jax.devices()[:n]), ("data",)), P("data"))
x, k = jax.numpy.arange(24.0).reshape(8, 3), jax.random.split(jax.random.key(1), 8)
put = lambda n: {"x": jax.device_put(x, sharding(n)), "k": jax.device_put(k, sharding(n))}
with Checkpoints(sys.argv[1]) as c:
    c.save(1, put(4), {})
    for n in (4, 2, 1):
        s = c.restore(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), put(n))).state
        assert s["x"].sharding == sharding(n) and s["k"].sharding == sharding(n)
        assert (s["x"] == x).all() and (jax.random.key_data(s["k"]) == jax.random.key_data(k)).all()
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env=environment, timeout=60)


@dataclass(frozen=True, kw_only=True)
class FolderProbe(Config):
    width: int = 1
    rate: float = 0.1


def test_folder_is_created_and_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / run_folder_name("probe", FolderProbe())
    for _ in range(2):
        with RunFolder(path, FolderProbe()) as folder:
            assert folder.checkpoints.is_dir() and json.loads(folder.config_file.read_text())["width"] == 1
    assert sorted(p.name for p in path.iterdir()) == ["checkpoints", "config.json", "lock"]
    assert (path / "lock").read_text() == "", "a job that exits normally removes its name from the lock"
    RunFolder(tmp_path / "untouched", FolderProbe(), process_index=1).close()
    assert not (tmp_path / "untouched").exists()


@pytest.mark.fault("R17")
def test_folder_of_another_config_is_rejected(tmp_path: Path) -> None:
    RunFolder(tmp_path, FolderProbe()).close()
    with pytest.raises(RunFolderError, match=r"(?s)another config.*width: 1 -> 2"):
        RunFolder(tmp_path, FolderProbe(width=2))
    RunFolder(tmp_path, FolderProbe()).close()
    (tmp_path / "config.json").write_text('{"schema": 1, "class": "Gone"}')
    with pytest.raises(RunFolderError, match="Gone"):
        RunFolder(tmp_path, FolderProbe())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="not JSON"):
        RunFolder(tmp_path, FolderProbe())


def test_folders_without_a_run_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="not a run"):
        RunFolder(tmp_path, FolderProbe())
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder(tmp_path / "thesis.tex" / "run", FolderProbe())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.fault("R11")
def test_lock_rejects_a_second_job_and_survives_a_dead_one(tmp_path: Path) -> None:
    """The owner of the lock is another process, which is killed and cannot remove it."""
    script = f"import fcntl, os, time; f = open({str(tmp_path / 'lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
    script += "f.write('process 7 on elsewhere'); f.flush(); print(flush=True); time.sleep(60)"
    RunFolder(tmp_path, FolderProbe()).close()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(RunFolderError, match="in use by process 7 on elsewhere"):
            RunFolder(tmp_path, FolderProbe())
        holder.kill()
    with pytest.warns(RunFolderWarning, match="process 7 on elsewhere"):
        folder = RunFolder(tmp_path, FolderProbe())
    with folder, pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on"):
        RunFolder(tmp_path, FolderProbe())
    RunFolder(tmp_path, FolderProbe()).close()


@pytest.mark.fault("S4")
def test_lock_does_not_follow_a_symbolic_link(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", FolderProbe()).close()
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run/lock").unlink()
    (tmp_path / "run/lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunFolderError, match="lock is a symbolic link"):
        RunFolder(tmp_path / "run", FolderProbe())
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.fault("S3")
@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "/a", "a b", "~", "a\0", "a\n", "‮x", "x" * 101, "a\\b"])
def test_unsafe_run_names_are_rejected(name: str) -> None:
    with pytest.raises(RunFolderError, match="cannot name a run"):
        run_folder_name(name, FolderProbe())


@pytest.mark.fault("R9")
def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


class DiskCalls:
    """Records the order of `os.fsync` and `os.replace`; files and folders are known by their inodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.synced: list[int] = []
        self.synced_before_rename: list[int] = []
        fsync, rename = os.fsync, os.replace

        def record_fsync(descriptor: int) -> None:
            self.synced.append(os.fstat(descriptor).st_ino)
            fsync(descriptor)

        def record_rename(source: Path, target: Path) -> None:
            self.synced_before_rename = list(self.synced)
            rename(source, target)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "replace", record_rename)

    def assert_survives(self, path: Path) -> None:
        """Content before the rename, and the folder with the new name after it."""
        content = [path, *path.rglob("*")] if path.is_dir() else [path]
        assert {p.stat().st_ino for p in content} <= set(self.synced_before_rename)
        assert path.parent.stat().st_ino in self.synced[len(self.synced_before_rename) :]


def write_nested(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("text")
    (folder / "c").write_text("text")


def test_replaced_files_and_folders_survive_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = DiskCalls(monkeypatch)
    write_atomic(tmp_path / "file", "text")
    calls.assert_survives(tmp_path / "file")
    create_folder_atomic(tmp_path / "folder", write_nested)
    calls.assert_survives(tmp_path / "folder")
    calls.synced.clear()
    (tmp_path / "other").mkdir()
    replace_path(tmp_path / "folder", tmp_path / "other" / "folder")
    assert {tmp_path.stat().st_ino, (tmp_path / "other").stat().st_ino} <= set(calls.synced)


def test_a_saved_checkpoint_survives_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = DiskCalls(monkeypatch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        assert {p.stat().st_ino for p in (tmp_path, *tmp_path.rglob("*"))} <= set(calls.synced)


def test_a_folder_is_created_with_all_files_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write_nested(folder)
        raise KeyError("b")

    with pytest.raises(KeyError):
        create_folder_atomic(tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())
    create_folder_atomic(tmp_path / "new", write_nested)
    with pytest.raises(OSError):
        create_folder_atomic(tmp_path / "new", lambda folder: (folder / "d").touch())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a", "c"] and len(list(tmp_path.iterdir())) == 1
