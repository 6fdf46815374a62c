"""Time and memory of the ops' XLA forms. `benchmarks/README.md` says what is measured.

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
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from benchmarks.jobs import OpCall
from benchmarks.op_cases import ALONE, CASES, RACED, Case, held_bytes
from benchmarks.turns import take_turns
from benchmarks.worker import Worker, WorkerError
from recallax.train.log import commit

RESULTS = Path(__file__).parent / "results" / "op_speed.jsonl"
MODES = ("eager", "compile")
PARTS = ("forward", "backward")
"""The op alone, and with the gradients of all its inputs."""
RACES = ((1024, 64), (2048, 64), (2048, 128))
"""Tokens, and the width of keys and values, against PyTorch."""
SHORT, LONG = 2048, 32768
LENGTHS = tuple(SHORT << i for i in range(5))
TAYLOR_KEYS = 16
"""BASED's: its features grow with the square of it."""
ALLOWED = 1e-4
"""Difference of an output or gradient from the opponent's, relative to its largest entry."""

type Row = dict[str, Any]


class Disagreement(RuntimeError):
    """The two sides do not compute the same."""


def agree(folder: Path, name: str) -> float:
    """The largest difference of output and gradients relative to the largest entry of each. Raises Disagreement."""
    ours, theirs = np.load(folder / "recallax.npz"), np.load(folder / f"{name}.npz")
    differences = {name: np.abs(x - theirs[name]).max() / np.abs(x).max() for name, x in ours.items()}
    for name, difference in differences.items():
        if not difference <= ALLOWED:
            what = "output" if name == "out" else f"gradient of {name}"
            raise Disagreement(
                f"{what} differs by {difference:.1e} of its largest entry between recallax and torch {name}, allowed "
                f"{ALLOWED:.0e}; they are not timed"
            )
    return float(max(differences.values()))


def sized(op: str, *, batch: int, length: int, heads: int, width: int, threads: int) -> OpCall:
    keys = TAYLOR_KEYS if op == "taylor_attention" else width
    return OpCall(op=op, batch=batch, length=length, heads=heads, keys=keys, values=width, threads=threads)


def opponents(case: Case) -> list[tuple[str, int]]:
    """Modes and chunks: both modes at the first chunk, eager at the others."""
    return [*((mode, case.chunks[0]) for mode in MODES), *(("eager", chunk) for chunk in case.chunks[1:])]


def race(python: str, call: OpCall, rounds: int, steps: int) -> Iterator[Row]:
    """A row per opponent and direction."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        call.write(folder)
        command = (sys.executable, "-m", "benchmarks.recallax_ops", str(folder))
        workers = {"recallax": stack.enter_context(Worker("recallax", command, call.threads, folder))}
        differences: dict[tuple[str, int], float] = {}
        for mode, chunk in opponents(CASES[call.op]):
            name = f"{mode}-{chunk}"
            command = (python, "-m", "benchmarks.torch_ops", str(folder), mode, str(chunk), f"{name}.npz")
            try:
                workers[name] = stack.enter_context(Worker(name, command, call.threads, folder))
            except WorkerError as error:
                print(f"{call.op}: {error}", file=sys.stderr)
                continue
            differences[mode, chunk] = agree(folder, name)
        for part in PARTS:
            turns = take_turns(workers, rounds, steps, part)
            for (mode, chunk), difference in differences.items():
                name = f"{mode}-{chunk}"
                yield {
                    "kind": "race",
                    **vars(call),
                    "part": part,
                    "mode": mode,
                    "opponent": CASES[call.op].opponent,
                    "chunk": chunk,
                    "rounds": rounds,
                    "steps": steps,
                    "recallax": turns.summary("recallax"),
                    "torch": turns.summary(name),
                    **turns.ratio(name, "recallax"),
                    "difference": float(f"{difference:.1e}"),
                    "other_cores": turns.others,
                    "versions": {**workers["recallax"].versions, **workers[name].versions},
                }


def lengthen(short: OpCall, rounds: int) -> Iterator[Row]:
    """One row: the op at two lengths, in turns."""
    with ExitStack() as stack:
        workers = {}
        for length in (SHORT, LONG):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            OpCall(**{**vars(short), "length": length}).write(folder)
            command = (sys.executable, "-m", "benchmarks.recallax_ops", str(folder))
            workers[str(length)] = stack.enter_context(Worker("recallax", command, short.threads, folder))
        turns = take_turns(workers, rounds, 2, "forward")
        times = turns.ratio(str(LONG), str(SHORT))
        yield {
            "kind": "length",
            **vars(short),
            "part": "forward",
            "rounds": rounds,
            "steps": 2,
            "times": {name: turns.summary(name) for name in workers},
            **{name: _per_token(x) for name, x in times.items()},
            "other_cores": turns.others,
            "versions": workers[str(SHORT)].versions,
        }


def _per_token(ratio: float | list[float]) -> float | list[float]:
    """A ratio of times of the two lengths as one of times per token."""
    if isinstance(ratio, list):
        return [round(x * SHORT / LONG, 3) for x in ratio]
    return round(ratio * SHORT / LONG, 3)


def weigh(call: OpCall) -> Iterator[Row]:
    """A row per direction: bytes held at each length."""
    for part in PARTS:
        case = CASES[call.op]
        held = [held_bytes(case, OpCall(**{**vars(call), "length": n}), backward=part == "backward") for n in LENGTHS]
        yield {
            "kind": "memory",
            **vars(call),
            "part": part,
            "lengths": LENGTHS,
            "bytes": held,
            "versions": {"jax": jax.__version__},
        }


def report(rows: Sequence[Row]) -> str:
    """The newest row of each kind and setting, as Markdown tables."""
    keys = ("kind", "op", "batch", "length", "heads", "keys", "values", "threads", "part", "mode", "chunk")
    newest = {tuple(row.get(key) for key in keys): row for row in rows}
    tables: list[tuple[str, Callable[[Row], str]]] = [
        (
            "| op | tokens | width | threads | part | opponent | recallax ms | torch ms | torch ÷ recallax | by turns "
            "| other cores |\n|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|",
            _race_line,
        ),
        (
            "| op | threads | ms at 2048 | ms at 32768 | per token, long ÷ short | by turns | other cores |\n"
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
    for kind, (head, line) in zip(("race", "length", "memory"), tables, strict=True):
        found = [line(row) for row in newest.values() if row["kind"] == kind]
        if found:
            parts.append("\n".join([head, *found]))
    return "\n\n".join(parts)


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _times(times: dict[str, float]) -> str:
    return f"{times['min_ms']:.1f} / {times['median_ms']:.1f}"


def _ratio(row: Row) -> tuple[str, str]:
    return f"**{row['ratio']:.2f}**", "–".join(f"{x:.2f}" for x in row["ratios"])


def _race_line(row: Row) -> str:
    what = (
        row["op"],
        row["length"],
        row["keys"],
        row["threads"],
        row["part"],
        f"{row['mode']}, chunks of {row['chunk']}",
    )
    return _cells(*what, _times(row["recallax"]), _times(row["torch"]), *_ratio(row), row["other_cores"])


def _length_line(row: Row) -> str:
    times = (_times(row["times"][str(length)]) for length in (SHORT, LONG))
    return _cells(row["op"], row["threads"], *times, *_ratio(row), row["other_cores"])


def _memory_line(row: Row) -> str:
    held = dict(zip(row["lengths"], row["bytes"], strict=True))
    sizes = (f"{held[length] / 2**20:.1f}" for length in (SHORT, LONG))
    slope = held[LONG] * 8192 / (held[8192] * LONG)
    doubled = held[LONG] / held[LONG // 2]
    added = (held[LONG] - held[LONG // 2]) / (held[LONG // 2] - held[LONG // 4]) / 2
    ratios = (f"{x:.3f}" for x in (doubled, slope, added))
    return _cells(row["op"], row["part"], *sizes, f"{held[LONG] / LONG:,.0f}", *ratios)


def measurements(args: argparse.Namespace) -> Iterator[Row]:
    """All rows that were asked for, one after another."""
    if "memory" in args.kind:
        for op in ALONE:
            if op in args.op:
                yield from weigh(sized(op, batch=1, length=LONG, heads=2, width=64, threads=1))
    if "length" in args.kind:
        for op in ALONE:
            for threads in args.threads if op in args.op else ():
                yield from lengthen(sized(op, batch=1, length=SHORT, heads=2, width=64, threads=threads), args.rounds)
    if "race" in args.kind:
        python = machine.torch_python(args.torch_python, "transformers")
        for op, (length, width) in product(RACED, RACES):
            asked = op in args.op and length in args.length and width in args.width
            for threads in args.threads if asked else ():
                call = sized(op, batch=2, length=length, heads=4, width=width, threads=threads)
                yield from race(python, call, args.rounds, args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.op_speed", description="Time and memory of the ops.")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"), help="with torch and transformers")
    parser.add_argument("--kind", choices=("memory", "length", "race"), nargs="+", default=["memory", "length", "race"])
    parser.add_argument("--op", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 2048], help="tokens in a race")
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128], help="of keys and values in a race")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=8, help="turns that each side gets, besides one of warm-up")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn of a race")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the tables of the results file, measure nothing")
    args = parser.parse_args()
    if args.report:
        print(report([json.loads(line) for line in args.results.read_text().splitlines()]))
        return
    source = commit()
    args.results.parent.mkdir(exist_ok=True)
    for row in measurements(args):
        row |= {**machine.described(), "commit": source}
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(report([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
