"""The log: strict JSON, no truncated lines, and no step twice."""

import codecs
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import recallax.train
from recallax.train.log import LogError, RunLog, environment, git_commit, read_last_row, read_log
from recallax.train.progress import LiveProgress, PlainProgress, make_progress


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_rows_are_strict_json_and_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    values = {"a": jnp.float32(0.5), "b": np.int64(3), "c": math.nan, "d": -math.inf, "e": None, "split": "test"}
    with RunLog(path, "f00d") as log:
        log.write_run_row(0, {"state_bytes": 7})
        log.write("eval", 10, values)
    run, row = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert run["kind"] == "run" and run["state_bytes"] == 7 and run.items() >= environment().items()
    assert {k: row[k] for k in ("kind", "step", "fingerprint", "a", "b", "e", "split")} == {
        "kind": "eval", "step": 10, "fingerprint": "f00d", "a": 0.5, "b": 3, "e": None, "split": "test",
    }  # fmt: skip
    assert isinstance(row["b"], int) and math.isnan(float(row["c"])) and float(row["d"]) == -math.inf
    assert read_log(path) == [run, row]


def test_reserved_keys_are_rejected(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl", "f") as log, pytest.raises(ValueError, match="step"):
        log.write("train", 1, {"step": 2})


@pytest.mark.fault("R22")
def test_truncated_last_line_is_skipped_and_removed(tmp_path: Path) -> None:
    """A killed process may truncate the last row at any byte."""
    path = tmp_path / "log.jsonl"
    with RunLog(path, "f") as log:
        log.write("train", 1, {"loss": 1.0})
        log.write("train", 2, {"loss": 2.0})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_log(path)] == [1]
        with RunLog(path, "f") as log:
            log.write("train", 2, {"loss": 3.0})
        assert [row["loss"] for row in read_log(path)] == [1.0, 3.0]


@pytest.mark.fault("R22")
@pytest.mark.parametrize("line", [b'{"kind": "tr', b"[]", b'{"kind": "train"}', b"<<<<<<< a", b"\xff\x00"])
def test_truncated_middle_line_is_an_error(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, "f") as log:
        log.write("train", 1, {})
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(LogError, match="line 1 is not a row"):
        read_log(path)
    with pytest.raises(LogError, match="line 1 is not a row"):
        RunLog(path, "f")


def test_blank_lines_and_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, "f") as log:
        log.write("train", 1, {"loss": 1.0})
        log.write("eval", 1, {"loss": 2.0})
    first, second = path.read_bytes().splitlines()
    path.write_bytes(codecs.BOM_UTF8 + first + b"\r\n\r\n \n" + second)
    assert [row["loss"] for row in read_log(path)] == [1.0, 2.0]


def test_last_row_of_a_log_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    assert read_last_row(path, "train") is None and read_last_row(tmp_path, "train") is None
    with RunLog(path, "f") as log:
        log.write("train", 1, {})
        log.write("train", 2, {})
        log.write("eval", 2, {})
    whole = path.read_bytes()
    for tail in (b"", b'{"kind": "train", "step": 3', b"\xff\x00\n", b"[" * 100_000 + b"\n", b'{"kind": "train"}\n'):
        path.write_bytes(whole + tail)
        row = read_last_row(path, "train")
        assert (row is None) == (len(tail) > 2**16) and (row is None or row["step"] == 2)
    path.write_bytes(whole)
    monkeypatch.setattr("recallax.train.log.TAIL_BYTES", len(whole.splitlines()[-1]) + 5)
    assert read_last_row(path, "train") is None and read_last_row(path, "eval") is not None


@pytest.mark.fault("R22")
def test_truncate_removes_later_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, "f") as log:
        for step in range(5):
            log.write("train", step, {})
    path.write_text(path.read_text().replace('"seconds": 0.', '"seconds": 100.'))
    with RunLog(path, "f") as log:
        log.truncate(2)
        for step in (3, 4):
            log.write("train", step, {})
    rows = read_log(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["seconds"] >= rows[0]["seconds"] >= 100, "seconds must not go backwards in a resumed run"


def test_tensorboard_has_the_values(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl", "f", tensorboard=tmp_path / "tb") as log:
        log.write_run_row(0, {})
        log.write("train", 1, {"loss": 1.5, "bad": math.nan})
        log.write("eval", 1, {"split": "valid", "accuracy": 0.25})
    (events,) = (tmp_path / "tb").iterdir()
    data = events.read_bytes()
    assert b"train/loss" in data and b"valid/accuracy" in data and b"bad" not in data and b"cpus" not in data


def test_tensorboard_purges_later_steps(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    with RunLog(tmp_path / "log.jsonl", "f", tensorboard=tmp_path / "tb") as log:
        log.write_run_row(0, {})
        log.truncate(7)
        log.write("train", 8, {"loss": 1.5})
    (path,) = (tmp_path / "tb").iterdir()
    data, events = path.read_bytes(), []
    while data:  # a record: length in 8 bytes, 4 of checksum, the event, 4 of checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [e.step for e in events if e.session_log.status == SessionLog.START] == [8]


@pytest.mark.fault("R9", "R22")
def test_partial_write_of_a_row_is_an_error(tmp_path: Path) -> None:
    """A limit on the size of files simulates a disk that becomes full in the middle of a row."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with RunLog(tmp_path / "log.jsonl", "f") as log:
        log.write("train", 1, {})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "log.jsonl").stat().st_size + 10, limits[1]))
            with pytest.raises(LogError, match="10 of"):
                log.write("train", 2, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1]


def test_only_process_0_writes(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl", "f", tensorboard=tmp_path / "tb", process_index=1) as log:
        log.write_run_row(0, {})
        log.write("train", 1, {"loss": 1.0})
        log.truncate(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("R10")
def test_unwritable_log_is_an_error(tmp_path: Path) -> None:
    with RunLog(tmp_path / "gone" / "log.jsonl", "f") as log, pytest.raises(LogError, match="cannot be written"):
        log.write("train", 1, {})
    with pytest.raises(LogError, match="cannot be read"):
        read_log(tmp_path / "absent")
    with RunLog(tmp_path / "full", "f") as log, pytest.raises(LogError, match="No space left"):
        (tmp_path / "full").symlink_to("/dev/full")
        log.write("train", 1, {})


def test_git_commit_is_that_of_the_source() -> None:
    commit = git_commit()
    assert commit is None or (len(commit.removesuffix("+dirty")) == 40)


def test_git_commit_ignores_changed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, rows = tmp_path / "log.py", tmp_path / "results.jsonl"
    for path in (source, rows):
        path.write_text("")
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", "-C", str(tmp_path), *arguments.split()], check=True)
    monkeypatch.setattr("recallax.train.log.__file__", str(source))
    clean = git_commit()
    rows.write_text("{}\n")
    assert clean is not None and len(clean) == 40 and git_commit() == clean
    source.write_text("changed")
    assert git_commit() == f"{clean}+dirty"


def test_git_commit_does_not_write_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refresh of the index takes its lock, and a git command of the user at that moment fails."""
    source = tmp_path / "log.py"
    source.write_text("")
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", "-C", str(tmp_path), *arguments.split()], check=True)
    monkeypatch.setattr("recallax.train.log.__file__", str(source))
    os.utime(source, (1, 1))  # the index has another time, which `git status` would update
    index = (tmp_path / ".git/index").read_bytes()
    assert git_commit() is not None
    assert (tmp_path / ".git/index").read_bytes() == index


def test_git_commit_without_git_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_plain_progress_is_lines_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress(100) as display:
        assert isinstance(display, PlainProgress)
        display.show_compiling("step\x1b[31m\r")
        display.update(50, {"loss": 1.25, "accuracy": 0.5, "x\x1b]0;evil\x07": math.nan}, 1234567.0)
        display.note("saved\nstep 50")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(c.isprintable() for line in lines for c in line)
    assert "compiling step" in lines[0]
    assert all(part in lines[1] for part in ("50/100", "loss 1.25", "accuracy 0.5", "1.23M tokens/s", "left"))


def test_live_progress_shows_the_same() -> None:
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, color_system=None)
    with LiveProgress(100, console) as display:
        display.show_compiling("the first step")
        display.update(50, {"loss": 1.25, "[red]accuracy": 0.5}, 1234.0)
        display.note("saved [bold]step[/bold] 50 \x1b]0;evil\x07")
    text = out.getvalue()
    for part in ("compiling the first step", "50/100", "loss 1.25", "[red]accuracy 0.5", "1.23k tokens/s"):
        assert part in text
    assert "saved [bold]step[/bold] 50" in text and "\x1b]0;" not in text and "\x07" not in text


def test_import_is_fast() -> None:
    """Large packages are imported only where they are used."""
    modules = "recallax.train, recallax.train.log, recallax.train.progress, recallax.report, recallax.train.run_folder"
    script = f"import sys, {modules}; print(*{{'jax', 'rich', 'matplotlib', 'tensorboardX'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == ""


def test_public_names_of_the_package_resolve() -> None:
    assert all(hasattr(recallax.train, name) for name in recallax.train.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = recallax.train.nothing
