"""Symbolic links inside of folders that recallax writes: nothing outside of the folder is written or deleted."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from recallax.atomic_files import create_folder_atomic
from recallax.config import ConfigError
from recallax.configs import mqar_micro
from recallax.paths import SymlinkError, reject_links
from recallax.sweep import run_sweep
from recallax.sweep.backends.local import LocalBackend
from recallax.tasks.text import cache_folder
from recallax.train.checkpoint import Checkpoints
from recallax.train.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.fault("S4")

CONFIG = mqar_micro.get_tiny()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that must not change."""
    folder = tmp_path / "outside"
    (folder / "3").mkdir(parents=True)
    (folder / "3/precious").write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() if path.is_file() else "" for path in folder.rglob("*")}


def test_links_that_lead_out_of_a_folder_are_rejected(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "out"  # its name is the start of the other's
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (folder / "inside").symlink_to("file")
    reject_links(folder, tmp_path / "link", tmp_path / "missing")
    (folder / "link").symlink_to(outside)
    with pytest.raises(SymlinkError, match=f"{folder}/link is a symbolic link to {outside}, outside of its folder"):
        reject_links(tmp_path, folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "log.jsonl", "lock", "row.json", "tensorboard", "tensorboard/events", "checkpoints"]
    + [f"checkpoints/{name}" for name in ("quarantine", "trash", "3")],
)
def test_a_run_folder_with_a_link_is_rejected(tmp_path: Path, outside: Path, name: str) -> None:
    before, link = contents(outside), tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    target = outside / "3/precious" if Path(name).suffix or name == "lock" else outside
    link.symlink_to(target)
    (link.parent / "lock").touch()
    if name != "config.json":
        (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=f"{link} is a symbolic link to {target}"):
        RunFolder(tmp_path / "run", CONFIG)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["quarantine", "trash"])
def test_checkpoints_do_not_follow_a_link_that_appears_while_they_are_open(
    tmp_path: Path, outside: Path, name: str
) -> None:
    before, folder = contents(outside), tmp_path / "checkpoints"
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
        (folder / name).symlink_to(outside)
        with pytest.raises(SymlinkError, match=f"{folder}/{name} is a symbolic link to {outside}"):
            checkpoints.save(2, {"x": jnp.ones(3)}, {})
        assert checkpoints.steps() == [1]
    with pytest.raises(SymlinkError, match="symbolic link"):
        Checkpoints(folder, max_to_keep=1)
    with Checkpoints(folder, max_to_keep=None) as reader:
        assert reader.restore({"x": jnp.zeros(3)}) is not None
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["results.jsonl", "0123456789", "0123456789.log"])
def test_a_sweep_folder_with_a_link_is_rejected(tmp_path: Path, outside: Path, name: str) -> None:
    before, out = contents(outside), tmp_path / "sweep"
    (tmp_path / "sweep.py").write_text("STAGES = [lambda rows: []]\n")
    out.mkdir()
    (out / name).symlink_to(outside / "3/precious")
    with pytest.raises(SymlinkError, match=f"{out}/{name} is a symbolic link to {outside}/3/precious"):
        run_sweep(tmp_path / "sweep.py", out, LocalBackend(workers=1))
    assert contents(outside) == before


def test_a_new_folder_does_not_replace_a_link(tmp_path: Path, outside: Path) -> None:
    before = contents(outside)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/export").symlink_to(outside)
    with pytest.raises(SymlinkError, match=f"{tmp_path}/new/export is a symbolic link to {outside}"):
        create_folder_atomic(tmp_path / "new/export", lambda folder: (folder / "file").touch())
    assert contents(outside) == before and (tmp_path / "new/export").is_symlink()


def test_the_lock_of_a_cached_folder_does_not_follow_a_link(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(outside)
    monkeypatch.setenv(cache_folder.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/.text.lock").symlink_to(outside / "3/precious")
    with pytest.raises(ConfigError, match="symbolic link"):
        cache_folder.cached_folder("text", lambda folder: None)
    assert contents(outside) == before
