"""Time per training step against PyTorch, in turns on the same cores. `benchmarks/README.md` says what is measured.

    python -m benchmarks.train_speed --torch-python PATH     measure, and append rows to results/train_speed.jsonl
    python -m benchmarks.train_speed --report                the newest rows as a table

PATH is a Python that has torch and numpy; the environment variable TORCH_PYTHON does as well.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.jobs import Training
from benchmarks.turns import Turns, take_turns
from benchmarks.worker import Answer, Worker
from recallax.train.log import commit

RESULTS = Path(__file__).parent / "results" / "train_speed.jsonl"
SETTINGS = {"small": (256, 64, 8), "large": (8192, 256, 64)}
"""Vocabulary, length and pairs."""
MIXERS = ("based", "attention")
MODES = ("eager", "compile")
CHECKED = 8
"""Steps that both sides take first: they compile, and must agree."""

COLUMNS = (
    *("size", "model", "threads", "opponent", "recallax ms", "torch ms", "recallax tokens/s"),
    *("torch ÷ recallax", "by turns", "other cores"),
)

type Row = dict[str, Any]


class Disagreement(RuntimeError):
    """The two sides do not train the same model."""


def agree(name: str, ours: Answer, theirs: Answer) -> float:
    """The largest relative difference of losses and gradient norms. Raises Disagreement.

    The first step must agree to 1e-4: model and gradient. Those after it to 1e-3: the optimizer, whose division by the
    root of tiny second moments magnifies rounding.
    """
    worst = 0.0
    for index, (first, second) in enumerate(zip(ours.readings, theirs.readings, strict=True)):
        for what, x, y in zip(("loss", "gradient norm"), first, second, strict=True):
            difference, allowed = abs(x - y) / abs(x), 1e-3 if index else 1e-4
            if not difference <= allowed:
                raise Disagreement(
                    f"{what} at step {index} is {x:.7g} in recallax and {y:.7g} in torch {name}: relative difference "
                    f"{difference:.1e}, allowed {allowed:.0e}; they are not timed"
                )
            worst = max(worst, difference)
    return worst


def measure(python: str, setting: str, mixer: str, threads: int, rounds: int, steps: int) -> list[Row]:
    """Rows of one model at one size: a row per mode of the opponent."""
    vocab_size, length, pairs = SETTINGS[setting]
    total = CHECKED + (rounds + 1) * steps
    job = Training(mixer=mixer, vocab_size=vocab_size, length=length, pairs=pairs, threads=threads, steps=total)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job.write(folder)
        commands = {"recallax": (sys.executable, "-m", "benchmarks.recallax_mqar", str(folder))}
        commands |= {mode: (python, "-m", "benchmarks.torch_mqar", str(folder), mode) for mode in MODES}
        workers = {name: stack.enter_context(Worker(name, each, threads, folder)) for name, each in commands.items()}
        first = {name: worker.steps(CHECKED) for name, worker in workers.items()}
        differences = {mode: agree(mode, first["recallax"], first[mode]) for mode in MODES}
        turns = take_turns(workers, rounds, steps)
    rows = []
    for mode in MODES:
        rows.append(
            {
                "setting": setting,
                "mixer": mixer,
                "threads": threads,
                "mode": mode,
                "vocab_size": vocab_size,
                "length": length,
                "pairs": pairs,
                "d_model": job.d_model,
                "batch_size": job.batch_size,
                "rounds": rounds,
                "steps": steps,
                "recallax": _summary(turns, "recallax", first, job),
                "torch": _summary(turns, mode, first, job),
                **turns.ratio(mode, "recallax"),
                "difference": float(f"{differences[mode]:.1e}"),
                "other_cores": turns.others,
                **machine.described(),
                "versions": {**workers["recallax"].versions, **workers[mode].versions},
            }
        )
    return rows


def _summary(turns: Turns, side: str, first: dict[str, Answer], job: Training) -> dict[str, float]:
    times = turns.summary(side)
    return {
        **times,
        "tokens_per_second": round(1e3 * job.batch_size * job.length / times["median_ms"]),
        "first_step_s": round(first[side].seconds[0], 2),
    }


def report(rows: Sequence[Row]) -> str:
    """The newest row of each setting, mixer, number of threads and mode, as a Markdown table."""
    newest = {(r["setting"], r["mixer"], r["threads"], r["mode"]): r for r in rows}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|--:|---|--:|--:|--:|--:|--:|--:|"]
    for key in product(SETTINGS, MIXERS, (2, 1), MODES):
        if key not in newest:
            continue
        row = newest[key]
        ours, theirs = (f"{row[side]['min_ms']:.1f} / {row[side]['median_ms']:.1f}" for side in ("recallax", "torch"))
        low, high = row["ratios"]
        cells = (*key, ours, theirs, f"{row['recallax']['tokens_per_second']:,}", f"**{row['ratio']:.2f}**")
        lines.append("| " + " | ".join(map(str, (*cells, f"{low:.2f}–{high:.2f}", row["other_cores"]))) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_speed", description="Training speed.")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"), help="a Python with torch and numpy")
    parser.add_argument("--setting", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--mixer", choices=MIXERS, nargs="+", default=list(MIXERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=12, help="turns that each side gets, besides one of warm-up")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the table of the results file and measure nothing")
    args = parser.parse_args()
    if args.report:
        print(report([json.loads(line) for line in args.results.read_text().splitlines()]))
        return
    python, source = machine.torch_python(args.torch_python), commit()
    args.results.parent.mkdir(exist_ok=True)
    for setting, mixer, threads in product(args.setting, args.mixer, args.threads):
        rows = [{**row, "commit": source} for row in measure(python, setting, mixer, threads, args.rounds, args.steps)]
        with args.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(report(rows), flush=True)


if __name__ == "__main__":
    main()
