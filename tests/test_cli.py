"""The command line: error messages, help without JAX, and runs that are stopped and resumed."""

import dataclasses
import errno
import importlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import tyro

from recallax.cli.config_files import config_names
from recallax.cli.main import COMMANDS, main
from recallax.cli.outputs import Output, output_options
from recallax.report import ReportError, write_report
from recallax.tasks.text import train_bpe

pytestmark = pytest.mark.xdist_group("cli")  # one process, because some tests share a run

RECALLAX = [sys.executable, "-m", "recallax"]
RUN = {
    "steps": 400,
    "batch-size": 16,
    "log-every": 10,
    "save-every": 50,
}
ARGUMENTS = ["mqar_micro", *(f"--train.{name}={value}" for name, value in RUN.items()), "--evaluate.batches=2"]
ARGUMENTS += ["--evaluate.every=100", "--model.dropout=0.1"]


def environment(**more: str) -> dict[str, str]:
    fast = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, **fast, **more}


# Wrong input: status 2, and a message with the field, its value, the rule and the remedy


def error_message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with status 2, and return its message. Other exceptions fail the test."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2, f"status {status}: {out}{err}"
    return " ".join((out + err).replace("│", " ").split())


WRONG_INPUT = {
    "mqar_mikro": ["no config 'mqar_mikro'", "did you mean 'mqar_micro'", "parity_attention"],
    "mqar_micro --optim.lrr 1": ["--optim.lrr", "--optim.lr FLOAT"],
    "mqar_micro --train.step 1": ["--train.step", "--train.steps"],
    "mqar_micro --optim.lr fast": ["--optim.lr", "'fast'", "float"],
    "mqar_micro --train.steps 2.5": ["--train.steps", "2.5", "int"],
    "mqar_micro --optim.lr nan": ["optim.lr is nan", "at least 0 and finite"],
    "mqar_micro --optim.lr inf": ["optim.lr is inf", "at least 0 and finite"],
    "mqar_micro --optim.b2 1": ["optim.b2 is 1.0", "below 1"],
    "mqar_micro --optim.warmup_ratio 5": ["optim.warmup_ratio is 5.0", "fraction from 0 to 1"],
    "mqar_micro --optim.max_grad_norm 0": ["optim.max_grad_norm is 0.0", "above 0"],
    "mqar_micro --train.steps 0": ["train.steps is 0", "at least 1"],
    "mqar_micro --train.data-seed -1": ["train.data_seed is -1", "at least 0"],
    "mqar_micro --train.gradient_accumulation_steps 3": [
        "train.batch_size 64",
        "multiple",
        "train.gradient_accumulation_steps 3",
    ],
    "mqar_micro --evaluate.every 0": ["evaluate.every is 0", "at least 1"],
    "mqar_micro --evaluate.batches 0": ["evaluate.batches is 0", "at least 1"],
    "mqar_micro --model.dropout 1": ["dropout is 1.0", "below 1"],
    "mqar_micro --model.compute float61": ["--model.compute", "float61", "bfloat16"],
    "mqar_micro --model.pattern=": ["pattern ''", "empty", "conv, mixer"],
    "mqar_micro --model.pattern=conv*0": ["pattern 'conv*0'", "'*'", "at least 1"],
    "mqar_micro --model.pattern=conv:mixr": ["unexpected ':'", "a term is a name"],
    "mqar_micro --model.pattern=mixr": ["names the block 'mixr'", "did you mean 'mixer'"],
    "mqar_micro --task.mixture.1.num-kv-pairs 9": [
        "length 32",
        "9 pairs",
        "num_passes + 2 K = 36",
        "increase length, or reduce num_kv_pairs",
    ],
    "mqar_micro --model.vocab-size 3": ["model.vocab_size is 3", "the task has 64"],
    "parity_attention --model.d-model 62": ["62 channels", "4 heads", "use one of 1, 2, 31, 62"],
    "mqar_micro --train.fsdp 3": ["train.fsdp 3", "does not fit", "devices"],
    "mqar_micro --distributed.process-id 0": ["distributed.coordinator_address", "HOST:PORT"],
    "mqar_micro --distributed.coordinator-address here": ["distributed.coordinator_address is 'here'", "HOST:PORT"],
    "mqar_micro --distributed.coordinator-address 127.0.0.1:1": [
        "distributed.num_processes is None",
        "both must be given",
    ],
}


@pytest.mark.parametrize("arguments", WRONG_INPUT)
def test_wrong_input_is_an_error(
    arguments: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_message(capsys, "train", *arguments.split())
    for part in WRONG_INPUT[arguments]:
        assert part in message, message
    assert list(tmp_path.iterdir()) == [], "no folder may be created"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            "--optim.lr nan --optim.b2 2 --train.steps=0 --model.dropout 1",
            ["dropout is 1.0", "optim.lr is nan", "optim.b2 is 2.0", "train.steps is 0"],
        ),
        (
            "--optim.lrr 1 --train.steps 2.5 --optim.lr fast --train.stepz=3 --evaluate.every 0",
            ["options: --optim.lrr", "'2.5'", "'fast'", "options: --train.stepz", "evaluate.every is 0"],
        ),
        # Values that are valid only together are no mistakes.
        ("--train.batch-size 66 --train.gradient-accumulation-steps 3 --optim.lr fast", ["'fast'"]),
    ],
)
def test_all_wrong_overrides_are_reported(arguments: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = error_message(capsys, "show", "mqar_micro", *arguments.split())
    for part in parts:
        assert part in message, message
    assert "multiple" not in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("trian", ["no command 'trian'", "did you mean 'train'"]),
        ("eval nowhere", ["nowhere is not a run folder"]),
        ("eval . --batches -1", ["batches is -1", "at least 1"]),
        ("eval . --split tset", ["tset", "'valid', 'test'"]),
        ("report nowhere", ["nowhere"]),
        ("generate nowhere --prompt 1", ["nowhere is not a run folder"]),
        ("generate .", ["either --prompt", "or --task-rows"]),
        ("generate . --prompt 1 --task-rows 1", ["either --prompt", "or --task-rows"]),
        ("generate . --task-rows 0", ["--task-rows is 0", "at least 1"]),
        ("generate . --task-rows 1 --context 1", ["--context needs --prompt"]),
        (
            "generate . --prompt 1 --num-repeats 2",
            ["num_repeats, fill_strategy and prefix_length", "give one with --context"],
        ),
        ("generate . --prompt 1 --temperature 0", ["temperature is 0.0", "above 0"]),
        ("generate . --prompt 1 --top-k 0", ["top_k is 0", "at least 1"]),
        ("show mqar_mikro", ["did you mean 'mqar_micro'"]),
        ("train", ["usage: recallax train CONFIG", "mqar_micro"]),
        ("train ../../etc/passwd", ["no config '../../etc/passwd'"]),
        ("list everything", ["Unrecognized options: everything", "recallax list --help"]),
    ],
)
def test_wrong_commands_are_errors(arguments: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = error_message(capsys, *arguments.split())
    for part in parts:
        assert part in message, message


# Outputs that cannot be written


def options_classes() -> Iterator[tuple[str, type]]:
    """Yield every command with the options dataclasses of its module."""
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"recallax.cli.{command.module or name}")
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                yield name, value


OUTPUTS = [(name, *item, options) for name, options in options_classes() for item in output_options(options).items()]
"""Every output option: the command, the field, its kind, and the options class."""


def required_arguments(command: str, options: type) -> list[str]:
    """Return values for the arguments that a command needs, so that it parses. Its run or file does not exist."""
    if COMMANDS[command].arguments.startswith("CONFIG"):
        return ["mqar_micro"]
    arguments = []
    for field in dataclasses.fields(options):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            hint = get_type_hints(options, include_extras=True)[field.name]
            if tyro.conf.Positional[Path] == hint or tyro.conf.Positional[tuple[Path, ...]] == hint:
                arguments.append("nowhere")
            else:
                value = get_args(hint)[0] if get_origin(hint) is Literal else "64"
                arguments += [f"--{field.name.replace('_', '-')}", value]
    return arguments


def test_every_option_for_a_path_to_write_is_marked() -> None:
    """An option whose type is a path names an output; what a command reads is positional."""
    assert {command for command, *_ in OUTPUTS} >= {"train", "calibrate", "export", "import", "report", "sweep"}
    for _, options in options_classes():
        hints = get_type_hints(options, include_extras=True)
        assert not {field for field, hint in hints.items() if hint in (Path, Path | None)}, options


@pytest.mark.parametrize("problem", ["folder", "parent", "forbidden", "full", "name"])
@pytest.mark.parametrize(("command", "option", "output", "options"), OUTPUTS, ids=[name for name, *_ in OUTPUTS])
def test_unwritable_output_is_an_error(
    command: str,
    option: str,
    output: Output,
    options: type,
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The message is about the output, although the run or file that the command reads does not exist either."""
    (tmp_path / "file").touch()
    path = {
        "folder": tmp_path if output.kind != "folder" else tmp_path / "file",
        "parent": tmp_path / "file" / "absent" / "out.html",
        "forbidden": Path("/proc/out.html") if sys.platform == "linux" else Path("/dev/null/out.html"),
        "full": Path("/dev/full"),
        "name": tmp_path / ("x" * 300) / "out.html",
    }[problem]
    before = sorted(tmp_path.rglob("*"))
    assert main([command, *required_arguments(command, options), f"--{option}", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--{option} {path} " in error, error
    assert "cannot be written: " in error or "already exists; " in error
    assert f"choose another {'file' if output.kind == 'file' else ''}" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk becomes full after the check of the option."""
    pytest.importorskip("tokenizers")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("recallax.atomic_files.os.fsync", fail)
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a\.json'"):
            train_bpe(["a text"], 257, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
    assert train_bpe(["a text"], 257, tmp_path / "a.json") >= 257
    with pytest.raises(ReportError, match="suffix of a table"):
        write_report([], tmp_path / "page.csv")


# Help without JAX


def test_help_and_list_import_no_jax() -> None:
    script = """
import sys
sys.modules["jax"] = sys.modules["flax"] = sys.modules["orbax"] = None  # importing them fails
from recallax.cli.main import main
for command in sys.argv[1:]:
    try:
        print(command, "->", main(command.split()))
    except SystemExit as stop:
        print(command, "->", stop.code)
"""
    commands = ["", "--help", "help", "--version", "list", "list --help", "nothing", "show --help", "train --help"]
    commands += ["train", "train nothing", "show nothing", "eval --help", "report --help", "eval"]
    commands += ["generate", "sweep"]
    others = ("calibrate", "corpus", "doctor", "export", "generate", "import", "sweep", "tokenizer")
    commands += [f"{name} --help" for name in others]
    command = [sys.executable, "-c", script, *commands]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 0, done.stderr
    statuses = dict(line.split(" -> ") for line in done.stdout.splitlines() if " -> " in line)
    helps = {c: "0" for c in commands if "help" in c or c in ("--version", "list")}
    assert {c: statuses[c] for c in commands} == {c: helps.get(c, "2") for c in commands}
    for name, line in config_names().items():
        assert f"{name} " in done.stdout and line in done.stdout and line


def test_broken_pipe_exits_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*RECALLAX, "list"], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_show_prints_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "mqar_micro", "--model.d-model", "16"]) == 0
    out = capsys.readouterr().out
    assert '"d_model": 16' in out and "fingerprint" in out
    for line in (
        "parameters",
        "used per token",
        "forward FLOPs",
        "FLOPs per token",
        "layers            2: conv mixer",
        "1,024",
    ):
        assert line in out


# Runs that are stopped and resumed


class Attempt(NamedTuple):
    """Result of one process of a run."""

    status: int
    step: int
    """Step of the newest checkpoint."""
    rows: list[dict[str, Any]]
    err: str


def start_run(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [*RECALLAX, "train", *ARGUMENTS, "--run", str(folder), *more]
    with open(folder.with_suffix(".err"), "w") as err:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, text=True, env=environment())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "log.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1]]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until the condition is true or the process ends."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.005)


def run_attempt(folder: Path, number: signal.Signals | None = None, after: int = 0) -> Attempt:
    """Start or resume the run, and send the signal when it has logged a step beyond `after`."""
    process = start_run(folder)
    if number is not None:
        wait_for(lambda: any(row["step"] >= after for row in read_rows(folder) if row["kind"] == "train"), process)
        process.send_signal(number)
    status = process.wait(120)
    steps = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()]
    return Attempt(status, max(steps, default=0), read_rows(folder), folder.with_suffix(".err").read_text())


def checksums(folder: Path, step: int) -> dict[str, Any]:
    """Return the recorded checksums of a checkpoint's leaves."""
    return json.loads((folder / "checkpoints" / str(step) / "meta" / "metadata").read_text())["body"]["leaves"]


def metrics(rows: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    """Return the evaluations by step and split. None may occur twice."""
    evaluations = [row for row in rows if row["kind"] == "eval"]
    values = {(row["step"], row["split"]): {k: v for k, v in row.items() if k != "seconds"} for row in evaluations}
    assert len(values) == len(evaluations)
    return values


def assert_no_step_twice(rows: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == sorted(set(steps))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run_attempt(folder).status == 0
    return folder


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Attempt]]:
    """One run: stopped by SIGTERM, then by SIGINT, then killed with a damaged newest checkpoint, then finished."""
    folder = tmp_path_factory.mktemp("attempts") / "run"
    rng = random.Random(0)
    ends = {"SIGTERM": run_attempt(folder, signal.SIGTERM, rng.randint(60, 120))}
    ends["SIGINT"] = run_attempt(folder, signal.SIGINT, ends["SIGTERM"].step + rng.randint(10, 60))
    damaged = folder / "checkpoints" / str(ends["SIGINT"].step) / "state" / "d"
    for path in damaged.iterdir():
        os.truncate(path, path.stat().st_size // 2)
    ends["SIGKILL"] = run_attempt(folder, signal.SIGKILL, ends["SIGINT"].step + rng.randint(20, 80))
    ends["finished"] = run_attempt(folder)
    return folder, ends


@pytest.mark.fault("R3")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_checkpoint(attempts: tuple[Path, dict[str, Attempt]], name: str) -> None:
    end = attempts[1][name]
    assert end.status == 75, end.err
    assert f"stopped at step {end.step}; run the same command again to resume" in end.err
    assert "Traceback" not in end.err
    assert end.rows[-1]["event"] == "interrupted" and end.rows[-1]["step"] == end.step < RUN["steps"]


@pytest.mark.fault("R6")
def test_damaged_checkpoint_is_quarantined(attempts: tuple[Path, dict[str, Attempt]]) -> None:
    folder, ends = attempts
    assert ends["SIGKILL"].status == -signal.SIGKILL
    step = ends["SIGINT"].step
    assert "CheckpointWarning" in ends["SIGKILL"].err
    assert f"{folder}/checkpoints/{step} is damaged and was moved to" in ends["SIGKILL"].err
    assert (folder / "checkpoints" / "quarantine" / str(step)).is_dir()
    started = [row["step"] for row in ends["SIGKILL"].rows if row["kind"] == "run"][-1]
    assert ends["SIGTERM"].step <= started < step


@pytest.mark.fault("R1", "R3", "R6")
def test_resumed_run_equals_uninterrupted_run(attempts: tuple[Path, dict[str, Attempt]], uninterrupted: Path) -> None:
    folder, ends = attempts
    assert ends["finished"].status == 0, ends["finished"].err
    assert checksums(folder, RUN["steps"]) == checksums(uninterrupted, RUN["steps"])
    rows = read_rows(folder)
    assert_no_step_twice(rows)
    assert metrics(rows) == metrics(read_rows(uninterrupted))
    assert [row["step"] for row in rows if row["kind"] == "train"][-1] == RUN["steps"]


def test_rows_name_config_device_and_commit(uninterrupted: Path) -> None:
    rows = read_rows(uninterrupted)
    (begin,) = [row for row in rows if row["kind"] == "run"]
    assert begin["device"] == "cpu" and "commit" in begin and begin["name"] == "mqar_micro"
    assert all(row["fingerprint"] == begin["fingerprint"] and row["seconds"] >= 0 for row in rows)


@pytest.mark.fault("R17")
def test_run_folder_of_another_config_is_an_error(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", *ARGUMENTS, "--run", str(uninterrupted), "--optim.lr", "0.5", "--task.power-a", "1"]
    message = error_message(capsys, *arguments)
    assert f"{uninterrupted} belongs to a run of another config" in message
    assert "optim.lr: 0.01 -> 0.5" in message and "task.power_a: 0.01 -> 1.0" in message
    assert "choose a new folder" in message


@pytest.mark.fault("R11")
def test_run_folder_in_use_is_an_error(uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recallax.config import from_json
    from recallax.train.run_config import RunConfig
    from recallax.train.run_folder import RunFolder, read_config

    config = from_json(read_config(uninterrupted), RunConfig)
    with RunFolder(tmp_path / "run", config):
        message = error_message(capsys, "train", *ARGUMENTS, "--run", str(tmp_path / "run"))
    assert f"is in use by process {os.getpid()}" in message and "choose another folder" in message


@pytest.mark.fault("R10")
def test_unwritable_run_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    message = error_message(capsys, "train", *ARGUMENTS, "--run", str(tmp_path / "file" / "run"))
    assert f"{tmp_path}/file/run cannot be written" in message and "choose another folder" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    message = error_message(capsys, "train", *ARGUMENTS, "--run", str(tmp_path / "full"))
    assert "is not empty and contains no config.json" in message and "choose a new folder" in message
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_eval_prints_metrics_and_writes_nothing(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in uninterrupted.rglob("*"))
    assert main(["eval", str(uninterrupted)]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = metrics(read_rows(uninterrupted))[RUN["steps"], "test"]
    assert float(shown["step"]) == RUN["steps"]
    assert float(shown["accuracy"]) == pytest.approx(expected["accuracy"], abs=1e-4)
    assert sorted((p, p.stat().st_mtime_ns) for p in uninterrupted.rglob("*")) == before
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_eval_repeats_the_context(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def accuracy(*options: str) -> str:
        assert main(["eval", str(uninterrupted), "--batches", "1", *options]) == 0
        return capsys.readouterr().out

    once = accuracy()
    assert accuracy("--fill-strategy", "left_pad", "--prefix-length", "64") == once
    assert accuracy("--num-repeats", "2") != once
    assert accuracy("--fill-strategy", "twice", "--prefix-length", "64") == accuracy("--num-repeats", "2")
    assert "fill_strategy 'twice' needs prefix_length" in error_message(
        capsys, "eval", str(uninterrupted), "--fill-strategy", "twice"
    )


def test_generate_answers_task_rows(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers equal the model's predictions on whole rows, and the expected answers those of the oracle."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from recallax.train.inference import first_question, load_trained_model

    before = sorted((p, p.stat().st_mtime_ns) for p in uninterrupted.rglob("*"))
    assert main(["generate", str(uninterrupted), "--task-rows", "4"]) == 0
    header, *rows, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["group", "tokens", "expected", "answer"]
    task, model = load_trained_model(uninterrupted)
    call, right = jax.jit(lambda tokens, seq: model(tokens, seq)[0]), 0
    for index, row in enumerate(rows):
        batch = task.batch(0, "test", index, 32)
        at = int(np.argmax(batch.weights[0] > 0))
        logits = call(jnp.asarray(batch.tokens), batch.seq)
        answer, expected = int(logits[0, at].argmax()), int(task.solve(np.asarray(batch.tokens))[0, at])
        group = task.groups[int(batch.group[0, at])]
        verdict = "correct" if answer == expected else "wrong"
        assert row.split() == [group, str(at + 1), str(expected), str(answer), verdict]
        right += answer == expected
        question = first_question(task, "test", index)
        assert question.prefix_length == batch.seq.prefix[0].sum() and np.array_equal(question.answer, [expected])
    assert summary == f"{right} of 4 correct"
    assert sorted((p, p.stat().st_mtime_ns) for p in uninterrupted.rglob("*")) == before


def test_generate_continues_prompts(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*options: str) -> list[str]:
        assert main(["generate", str(uninterrupted), *options]) == 0
        return capsys.readouterr().out.splitlines()

    both = lines("--prompt", "5 40 7 33 5 40 7 33 5", "7", "--max-new-tokens", "3")
    assert [len(line.split()) for line in both] == [3, 3]
    assert lines("--context", "5 40 7 33", "--num-repeats", "2", "--prompt", "5", "--max-new-tokens", "3") == both[:1]
    first = both[0].split()[0]
    assert lines(
        "--prompt",
        "5 40 7 33 5 40 7 33 5",
        "--max-new-tokens",
        "3",
        "--prefill-chunk-size",
        "4",
        "--stop-token-ids",
        first,
    ) == [first]
    sampled = lines(
        "--prompt", "5 40 7 33 5 40 7 33 5", "7", "--max-new-tokens", "3", "--temperature", "9", "--seed", "1"
    )
    assert sampled != both
    wrong = error_message(capsys, "generate", str(uninterrupted), "--prompt", "1,x")
    assert "the prompt '1,x' has the word 'x'" in wrong and "token ids separated by spaces" in wrong
    wrong = error_message(capsys, "generate", str(uninterrupted), "--prompt", "")
    assert "the prompt '' is empty" in wrong and "at least one token id" in wrong
    wrong = error_message(capsys, "generate", str(uninterrupted), "--prompt", "5 64")
    assert "prompt 0 has the token 64; ids of this model are 0 to 63" in wrong


@pytest.mark.fault("R3")
def test_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    """The second signal arrives while the first one waits for the step that is being compiled."""
    folder = tmp_path / "run"
    process = start_run(folder)
    wait_for(lambda: (folder / "log.jsonl").exists() and bool(read_rows(folder)), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (-signal.SIGTERM, 128 + signal.SIGTERM, 75)  # 75 if the step ended before the second one
    assert "Traceback" not in folder.with_suffix(".err").read_text()


@pytest.mark.fault("R1", trials=5)
@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_times_do_not_change_the_result(tmp_path: Path, uninterrupted: Path, seed: int) -> None:
    """Five kills at random times, including startup, compilation, saving and evaluation."""
    rng, folder = random.Random(seed), tmp_path / "run"
    for _ in range(5):
        process = start_run(folder)
        deadline = time.monotonic() + rng.uniform(1, 12)
        wait_for(lambda deadline=deadline: time.monotonic() > deadline, process)
        process.kill()
        process.wait()
    end = run_attempt(folder)
    assert end.status == 0, end.err
    assert checksums(folder, RUN["steps"]) == checksums(uninterrupted, RUN["steps"])
    assert_no_step_twice(end.rows)
    assert metrics(end.rows) == metrics(read_rows(uninterrupted))
