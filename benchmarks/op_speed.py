"""Measure time and memory of the ops' XLA implementations; `benchmarks/README.md` describes the measurements.

    python -m benchmarks.op_speed --torch-python PATH     measure, and append rows to results/op_speed.jsonl
    python -m benchmarks.op_speed --report                the newest rows as tables

PATH is a Python that has torch, transformers and numpy; the environment variable TORCH_PYTHON does as well.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from benchmarks.interleaved import run_interleaved
from benchmarks.messages import RECALLAX_RESULTS, OpMessage, read_arrays
from benchmarks.op_benchmarks import COMPARED, OP_BENCHMARKS, STANDALONE_OPS, OpCase, temporary_and_output_bytes
from benchmarks.worker import Worker, WorkerError
from recallax.train.log import git_commit

RESULTS = Path(__file__).parent / "results" / "op_speed.jsonl"
KINDS = ("memory", "length", "compare")
MODES = ("eager", "compile")
PASSES = ("forward", "backward")
"""The op alone, and with the gradients of all its inputs."""
COMPARED_SIZES = ((1024, 64), (2048, 64), (2048, 128))
"""Tokens, and the width of keys and values, of the comparisons with PyTorch."""
SHORT_LENGTH, LONG_LENGTH = 2048, 32768
LENGTHS = tuple(SHORT_LENGTH << i for i in range(5))
TAYLOR_FEATURE_DIM = 16
"""BASED's: its features grow with the square of it."""
TOLERANCE = 1e-4
"""Difference of an output or gradient from the opponent's, relative to its largest entry."""

type Row = dict[str, Any]


class OpMismatchError(RuntimeError):
    """The two sides do not compute the same."""


def check_agreement(folder: Path, name: str, message: OpMessage) -> float:
    """Compare an opponent's output and gradients with recallax's.

    Args:
        folder: Where both sides wrote them.
        name: The opponent, whose file is `NAME.npz`.
        message: The op and its sizes.

    Returns:
        The largest difference, relative to the largest entry of each array.

    Raises:
        Disagreement: A difference exceeds `TOLERANCE`.
        HandoverError: A file does not hold the declared arrays.
    """
    ours, theirs = (read_arrays(folder / file, message.result_specs()) for file in (RECALLAX_RESULTS, f"{name}.npz"))
    differences = {array: np.abs(x - theirs[array]).max() / np.abs(x).max() for array, x in ours.items()}
    for array, difference in differences.items():
        if not difference <= TOLERANCE:
            what = "output" if array == "out" else f"gradient of {array}"
            raise OpMismatchError(
                f"{what} differs by {difference:.1e} of its largest entry between recallax and the opponent {name}, "
                f"allowed {TOLERANCE:.0e}; they are not timed"
            )
    return float(max(differences.values()))


def make_op_call(op: str, *, batch: int, length: int, heads: int, width: int, threads: int) -> OpMessage:
    """Return the message of an op; `width` is that of keys and values, BASED's keys are `TAYLOR_FEATURE_DIM` wide."""
    keys = TAYLOR_FEATURE_DIM if op == "taylor_attention" else width
    return OpMessage(op=op, batch=batch, length=length, heads=heads, keys=keys, values=width, threads=threads)


def torch_settings(benchmark: OpCase) -> list[tuple[str, int]]:
    """Return modes and chunks: both modes at the first chunk, eager at the others."""
    return [*((mode, benchmark.chunks[0]) for mode in MODES), *(("eager", chunk) for chunk in benchmark.chunks[1:])]


def compare(opponent: Sequence[str], message: OpMessage, rounds: int, steps: int) -> Iterator[Row]:
    """Measure an op against its opponent.

    Args:
        opponent: The program of the opponent's side, which gets the folder, the mode, the chunk and a file's name.
        message: The op and its sizes.
        rounds: Bursts that each side runs, besides one to warm up.
        steps: Steps in a burst.

    Yields:
        A row per mode of the opponent and part.

    Raises:
        Disagreement: The sides do not compute the same.
        HandoverError: One side does not hand over what is declared.
        WorkerError: recallax's side or all opponents do not start.
    """
    case = OP_BENCHMARKS[message.op]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        message.write(folder)
        command = (sys.executable, "-m", "benchmarks.recallax_ops", str(folder))
        workers = {"recallax": stack.enter_context(Worker("recallax", command, message.threads, folder))}
        differences: dict[tuple[str, int], float] = {}
        for mode, chunk in torch_settings(case):
            name = f"{mode}-{chunk}"
            command = (*opponent, str(folder), mode, str(chunk), f"{name}.npz")
            try:
                workers[name] = stack.enter_context(Worker(name, command, message.threads, folder))
            except WorkerError as error:
                print(f"{message.op}: {error}", file=sys.stderr)
                continue
            differences[mode, chunk] = check_agreement(folder, name, message)
        if not differences:
            raise WorkerError(f"{message.op}: no opponent started")
        for part in PASSES:
            times = run_interleaved(workers, rounds, steps, part)
            for (mode, chunk), difference in differences.items():
                name = f"{mode}-{chunk}"
                yield {
                    "kind": "compare",
                    **vars(message),
                    "part": part,
                    "mode": mode,
                    "opponent": case.opponent,
                    "chunk": chunk,
                    "rounds": rounds,
                    "steps": steps,
                    "recallax": times.summary("recallax"),
                    "torch": times.summary(name),
                    **times.ratio(name, "recallax"),
                    "difference": float(f"{difference:.1e}"),
                    "other_cores": times.other_cores,
                    "versions": {**workers["recallax"].versions, **workers[name].versions},
                }


def compare_lengths(short: OpMessage, rounds: int) -> Iterator[Row]:
    """Measure an op's time at the lengths `SHORT_LENGTH` and `LONG_LENGTH`, alternately.

    Args:
        short: The op and its sizes.
        rounds: Bursts at each length, besides one to warm up.

    Yields:
        One row.
    """
    with ExitStack() as stack:
        workers = {}
        for length in (SHORT_LENGTH, LONG_LENGTH):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            replace(short, length=length).write(folder)
            command = (sys.executable, "-m", "benchmarks.recallax_ops", str(folder))
            workers[str(length)] = stack.enter_context(Worker("recallax", command, short.threads, folder))
        times = run_interleaved(workers, rounds, 2, "forward")
        ratios = times.ratio(str(LONG_LENGTH), str(SHORT_LENGTH))
        yield {
            "kind": "length",
            **vars(short),
            "part": "forward",
            "rounds": rounds,
            "steps": 2,
            "times": {name: times.summary(name) for name in workers},
            **{name: _per_token(x) for name, x in ratios.items()},
            "other_cores": times.other_cores,
            "versions": workers[str(SHORT_LENGTH)].versions,
        }


def _per_token(ratio: float | list[float]) -> float | list[float]:
    """Convert a ratio of times at the two lengths to one of times per token."""
    if isinstance(ratio, list):
        return [round(x * SHORT_LENGTH / LONG_LENGTH, 3) for x in ratio]
    return round(ratio * SHORT_LENGTH / LONG_LENGTH, 3)


def measure_memory(message: OpMessage) -> Iterator[Row]:
    """Compile an op at each of `ROWS_PER_LENGTH`.

    Args:
        message: The op and its sizes.

    Yields:
        A row per part, with the bytes of temporaries and outputs.
    """
    for part in PASSES:
        case, backward = OP_BENCHMARKS[message.op], part == "backward"
        held = [temporary_and_output_bytes(case, replace(message, length=n), backward=backward) for n in LENGTHS]
        yield {
            "kind": "memory",
            **vars(message),
            "part": part,
            "lengths": LENGTHS,
            "bytes": held,
            "versions": {"jax": jax.__version__},
        }


def report(rows: Sequence[Row]) -> str:
    """Return the newest row of each kind and setting as Markdown tables."""
    keys = ("kind", "op", "batch", "length", "heads", "keys", "values", "threads", "part", "mode", "chunk")
    newest = {tuple(row.get(key) for key in keys): row for row in rows}
    tables: list[tuple[str, Callable[[Row], str]]] = [
        (
            "| op | tokens | width | threads | part | opponent | recallax ms | torch ms | torch ÷ recallax | range "
            "| other cores |\n|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|",
            _comparison_line,
        ),
        (
            "| op | threads | ms at 2048 | ms at 32768 | per token, long ÷ short | range | other cores |\n"
            "|---|--:|--:|--:|--:|--:|--:|",
            _length_line,
        ),
        (
            "| op | part | MiB at 2048 | MiB at 32768 | bytes per token at 32768 | 32768 ÷ 16384 "
            "| per token, 32768 ÷ 8192 | per further token, likewise |\n|---|---|--:|--:|--:|--:|--:|--:|",
            _memory_line,
        ),
    ]
    parts = []
    for kind, (head, line) in zip(("compare", "length", "memory"), tables, strict=True):
        found = [line(row) for row in newest.values() if row["kind"] == kind]
        if found:
            parts.append("\n".join([head, *found]))
    return "\n\n".join(parts)


def _table_line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _times(times: dict[str, float]) -> str:
    return f"{times['min_ms']:.1f} / {times['median_ms']:.1f}"


def _ratio(row: Row) -> tuple[str, str]:
    return f"**{row['ratio']:.2f}**", "–".join(f"{x:.2f}" for x in row["ratios"])


def _comparison_line(row: Row) -> str:
    what = (
        row["op"],
        row["length"],
        row["keys"],
        row["threads"],
        row["part"],
        f"{row['mode']}, chunks of {row['chunk']}",
    )
    return _table_line(*what, _times(row["recallax"]), _times(row["torch"]), *_ratio(row), row["other_cores"])


def _length_line(row: Row) -> str:
    times = (_times(row["times"][str(length)]) for length in (SHORT_LENGTH, LONG_LENGTH))
    return _table_line(row["op"], row["threads"], *times, *_ratio(row), row["other_cores"])


def _memory_line(row: Row) -> str:
    held = dict(zip(row["lengths"], row["bytes"], strict=True))
    sizes = (f"{held[length] / 2**20:.1f}" for length in (SHORT_LENGTH, LONG_LENGTH))
    slope = held[LONG_LENGTH] * 8192 / (held[8192] * LONG_LENGTH)
    doubled = held[LONG_LENGTH] / held[LONG_LENGTH // 2]
    added = (held[LONG_LENGTH] - held[LONG_LENGTH // 2]) / (held[LONG_LENGTH // 2] - held[LONG_LENGTH // 4]) / 2
    ratios = (f"{x:.3f}" for x in (doubled, slope, added))
    return _table_line(row["op"], row["part"], *sizes, f"{held[LONG_LENGTH] / LONG_LENGTH:,.0f}", *ratios)


def measurements(args: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows that the command line requests."""
    if "memory" in args.kind:
        for op in STANDALONE_OPS:
            if op in args.op:
                yield from measure_memory(make_op_call(op, batch=1, length=LONG_LENGTH, heads=2, width=64, threads=1))
    if "length" in args.kind:
        for op in STANDALONE_OPS:
            for threads in args.threads if op in args.op else ():
                yield from compare_lengths(
                    make_op_call(op, batch=1, length=SHORT_LENGTH, heads=2, width=64, threads=threads), args.rounds
                )
    if "compare" in args.kind:
        opponent = (machine.torch_python(args.torch_python, "transformers"), "-m", "benchmarks.torch_ops")
        for op, (length, width) in product(COMPARED, COMPARED_SIZES):
            selected = op in args.op and length in args.length and width in args.width
            for threads in args.threads if selected else ():
                message = make_op_call(op, batch=2, length=length, heads=4, width=width, threads=threads)
                yield from compare(opponent, message, args.rounds, args.steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op_speed", description="Time and memory of the ops.")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"), help="with torch and transformers")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--op", choices=OP_BENCHMARKS, nargs="+", default=list(OP_BENCHMARKS))
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048], help="tokens in a comparison")
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128], help="of keys and values in a comparison")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=8, help="bursts that each side runs, besides one to warm up")
    parser.add_argument("--steps", type=int, default=5, help="steps in a burst of a comparison")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the tables of the results file, measure nothing")
    args = parser.parse_args(argv)
    if args.report:
        print(report([json.loads(line) for line in args.results.read_text().splitlines()]))
        return
    source = git_commit()
    args.results.parent.mkdir(exist_ok=True)
    for row in measurements(args):
        row |= {**machine.describe_machine(), "commit": source}
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(report([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
