"""No command prints escape sequences or fails on bytes that are not UTF-8, whatever its input contains."""

import dataclasses
import importlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeAliasType, get_args, get_origin, get_type_hints

import jax
import pytest
import tyro

from recallax.cli.main import COMMANDS, main
from recallax.config import ConfigError
from recallax.paths import expand_user
from recallax.sweep.display import SweepDisplay
from recallax.terminal import EscapingStream, escaped_output
from recallax.train.log import RunLog, read_log
from recallax.train.progress import make_progress

pytestmark = [pytest.mark.xdist_group("hostile"), pytest.mark.fault("S10")]  # one process: some tests share a run

HOSTILE = {
    "title": "\x1b]0;x\x07",
    "color": "\x1b[31m",
    "c1": "\x9b31m",
    "carriage_return": "a\rb",
    "bidi": "\u202e",
    "not_utf8": "\udcff\udc80",
    "unknown_user": "~nosuchuser",
    "null": "a\0b",
}
RUN_NAME = "\x1b]0;x\x07\r\u202e"
TEXT = f"{RUN_NAME}\udcff"
"""Hostile text in logs and messages. tensorstore has no paths that are not UTF-8, so it cannot be the name of a run."""
POSITIONAL = get_args(tyro.conf.Positional[int])[1]


class Option(NamedTuple):
    """An option of a command that is a text or a path."""

    flag: str
    """Its flag; empty for a positional argument."""
    is_path: bool


def text_options(command: str) -> list[Option]:
    """Return the options of a command that are texts or paths, from the dataclass that its parser is made of."""
    module = importlib.import_module(f"recallax.cli.{COMMANDS[command].module or command}")
    classes = [value for name, value in vars(module).items() if name.endswith("Options")]
    (options,) = (c for c in classes if dataclasses.is_dataclass(c) and c.__module__ == module.__name__)
    found = []
    for name, hint in get_type_hints(options, include_extras=True).items():
        leaves = list(type_leaves(hint))
        if str in leaves or Path in leaves:
            names = (getattr(leaf, "name", None) for leaf in leaves)
            renamed = next((other for other in names if isinstance(other, str)), name)
            flag = "" if POSITIONAL in leaves else f"--{renamed.replace('_', '-')}"
            found.append(Option(flag, Path in leaves))
    return found


def type_leaves(hint: Any) -> list[Any]:
    """Return the types and marks of which a type hint consists."""
    if isinstance(hint, TypeAliasType):
        return type_leaves(hint.__value__)
    return [hint] if get_origin(hint) is None else [leaf for part in get_args(hint) for leaf in type_leaves(part)]


def assert_harmless(text: str) -> None:
    text.encode()
    assert all(c.isprintable() or c in "\n\t" for c in text), repr(text)
    assert "Traceback" not in text, text


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command, and return its status and its output, which must be harmless."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert_harmless(out + err)
    assert isinstance(status, int)
    return status, out + err


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("command", COMMANDS)
def test_input_of_every_command_is_printed_harmlessly(
    command: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    name = "mqar_micro" if COMMANDS[command].arguments.startswith("CONFIG") else "file"
    unreadable = os.path.join("file", text)  # no file or folder can be there, so no command does any work
    calls = [[text], [name, text], [name, f"--{text}", text], [name, f"--{text}={text}"]]
    for option in text_options(command):
        for value in [unreadable, text] if option.is_path and command != "train" else [unreadable]:
            calls.append([value] if not option.flag else [name, option.flag, value])
    for call in calls:
        status, output = run_command(capsys, command, *call)
        assert status and output, call
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "a command has written something"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    "field",
    ["task.source.paths", "task.source.name", "task.tokenizer.file", "task.source.text-feature"],
)
def test_texts_in_configs_are_printed_harmlessly(
    field: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("show", "corpus"):
        run_command(capsys, command, "text_files", f"--{field}", text)


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step in a folder whose name and log have hostile texts."""
    folder = tmp_path_factory.mktemp("runs") / RUN_NAME
    arguments = ["--train.steps=1", "--train.save-every=1", "--evaluate.batches=1", "--train.batch-size=2"]
    out = io.StringIO()
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["train", "mqar_micro", *arguments, "--run", str(folder)]) == 0
    assert_harmless(out.getvalue())
    jax.config.update("jax_disable_most_optimizations", False)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"name": TEXT, f"group/{TEXT}": 0.5, f"measure/{TEXT}": 0.5, "device": TEXT}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "RUN", "--batches", "1"],
        ["generate", "RUN", "--task-rows", "1"],
        ["export", "RUN", "--to", "safetensors", "--out", f"OUT/{RUN_NAME}"],
        ["export", "RUN", "--to", "orbax", "--out", f"OUT/{RUN_NAME}"],
        ["report", "RUN", "--out", f"OUT/{TEXT}.html"],
        ["list"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_commands_about_a_run_with_hostile_names_succeed(
    arguments: list[str],
    hostile_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    call = [
        argument.replace("RUN", str(hostile_run), argument == "RUN").replace("OUT", "out") for argument in arguments
    ]
    status, output = run_command(capsys, *call)
    assert status == 0, output
    for file in tmp_path.rglob("*"):
        if file.suffix in (".html", ".csv", ".md", ".json"):
            assert_harmless(file.read_text())


def test_an_exported_run_with_a_hostile_name_is_imported(
    hostile_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, imported = str(tmp_path / f"e{RUN_NAME}"), str(tmp_path / f"i{RUN_NAME}")
    assert run_command(capsys, "export", str(hostile_run), "--to", "safetensors", "--out", exported)[0] == 0
    status, output = run_command(capsys, "import", exported, "--run", imported)
    assert status == 0, output
    assert run_command(capsys, "eval", imported, "--batches", "1")[0] == 0


def test_warnings_and_defects_are_printed_harmlessly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        sys.stderr.write(warnings.formatwarning(TEXT, UserWarning, TEXT, 1))
        raise ValueError(TEXT)

    monkeypatch.setattr("recallax.cli.main._run_command", fail)
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "UserWarning" in err
    assert_harmless(err.replace("Traceback", ""))


def test_tensorboard_has_metrics_with_hostile_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with escaped_output(), RunLog(tmp_path / "log.jsonl", TEXT, tensorboard=tmp_path / RUN_NAME) as log:
        log.write("train", 1, {TEXT: 1.0, "text": TEXT})
    (events,) = (tmp_path / RUN_NAME).iterdir()
    assert b"train/" in events.read_bytes() and b"\x1b]0" not in events.read_bytes()
    assert_harmless("".join(capfd.readouterr()))
    assert read_log(tmp_path / "log.jsonl")[0][TEXT] == 1.0


class Terminal(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True


def without_control_codes_of_rich(text: str) -> str:
    return io.StringIO(text).getvalue().replace("\x1b[", "").replace("\r", "")


def test_live_displays_are_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for out in (terminal := Terminal(), Terminal()):
        monkeypatch.setattr(sys, "stdout", out)
        with escaped_output():
            if out is terminal:
                with make_progress(10) as progress:
                    progress.update(1, {TEXT: 1.0}, 1.0)
                    progress.note(TEXT)
                    print(TEXT)
            else:
                with SweepDisplay(tmp_path / RUN_NAME) as display:
                    display.start_stage(1, 1, 1)
                    display.trial_started("name", {TEXT: TEXT}, 1)
                    display.refresh()
                    print(TEXT)
        text = out.getvalue()
        assert "\x1b[" in text, "the display is not live"
        assert r"\x1b]0;x\x07\r\u202e\udcff" in text
        assert_harmless(without_control_codes_of_rich(text))


def test_the_stream_escapes_what_its_encoding_lacks() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    EscapingStream(raw).writelines(["a\tb\n", "é\udcff\x1b"])
    assert raw.buffer.getvalue() == rb"a	b" b"\n" rb"\xe9\udcff\x1b"  # type: ignore[attr-defined]


# Paths


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_user("~/runs") == Path("/home/somebody/runs")
    assert expand_user("runs/~x") == Path.cwd() / "runs/~x"
    for path, problem in {
        "~nosuchuser/runs": "'~nosuchuser' has no home folder",
        "\udcff": "not UTF-8",
        "a\0b": "null character",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            expand_user(path)
