"""Compare the time per training step with PyTorch's on the same cores; `benchmarks/README.md` has the outcome.

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
from benchmarks.interleaved import InterleavedTimes, run_interleaved
from benchmarks.messages import PROJECTION_PATHS, StepReply, TrainingMessage
from benchmarks.worker import Worker
from recallax.train.log import git_commit

RESULTS = Path(__file__).parent / "results" / "train_speed.jsonl"
SETTINGS = {"small": (256, 64, 8), "large": (8192, 256, 64)}
"""Vocabulary, length and pairs."""
MIXERS = tuple(PROJECTION_PATHS)
MODES = ("eager", "compile")
CHECKED = 8
"""Steps that both sides run first: the sides compile meanwhile, and must agree."""

COLUMNS = (
    *("size", "model", "threads", "opponent", "recallax ms", "torch ms", "recallax tokens/s"),
    *("torch ÷ recallax", "range", "other cores"),
)

type Row = dict[str, Any]


class Disagreement(RuntimeError):
    """The two sides do not train the same model."""


def check_agreement(name: str, ours: StepReply, theirs: StepReply) -> float:
    """Compare the losses and gradient norms of both sides.

    The first step must agree to 1e-4, which checks the model and its gradient. Later steps must agree to 1e-3, which
    checks the optimizer: its division by the root of tiny second moments magnifies rounding.

    Args:
        name: The opponent.
        ours: recallax's reply.
        theirs: The opponent's reply to the same request.

    Returns:
        The largest relative difference.

    Raises:
        Disagreement: A difference exceeds what is allowed.
    """
    largest = 0.0
    for index, (first, second) in enumerate(zip(ours.readings, theirs.readings, strict=True)):
        for what, x, y in zip(("loss", "gradient norm"), first, second, strict=True):
            difference, allowed = abs(x - y) / abs(x), 1e-3 if index else 1e-4
            if not difference <= allowed:
                raise Disagreement(
                    f"{what} at step {index} is {x:.7g} in recallax and {y:.7g} in the opponent {name}: relative "
                    f"difference {difference:.1e}, allowed {allowed:.0e}; they are not timed"
                )
            largest = max(largest, difference)
    return largest


def measure(opponent: Sequence[str], message: TrainingMessage, rounds: int, checked: int = CHECKED) -> list[Row]:
    """Measure one model at one size.

    Args:
        opponent: The program of the opponent's side, which gets the folder and the mode.
        message: The model. Its steps are `checked` and what remains for `rounds` + 1 bursts of equal size.
        rounds: Bursts that each side runs, besides one to warm up.
        checked: Steps that both sides run first and that must agree.

    Returns:
        A row per mode of the opponent.

    Raises:
        Disagreement: The sides do not train the same model.
        WorkerError: A side does not start; the message has the end of its log.
    """
    steps = (message.steps - checked) // (rounds + 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        message.write(folder)
        commands = {"recallax": (sys.executable, "-m", "benchmarks.recallax_mqar", str(folder))}
        commands |= {mode: (*opponent, str(folder), mode) for mode in MODES}
        workers = {
            name: stack.enter_context(Worker(name, command, message.threads, folder))
            for name, command in commands.items()
        }
        first = {name: worker.run_steps(checked) for name, worker in workers.items()}
        differences = {mode: check_agreement(mode, first["recallax"], first[mode]) for mode in MODES}
        times = run_interleaved(workers, rounds, steps)
    rows = []
    for mode in MODES:
        rows.append(
            {
                "mixer": message.mixer,
                "threads": message.threads,
                "mode": mode,
                "vocab_size": message.vocab_size,
                "length": message.length,
                "pairs": message.pairs,
                "d_model": message.d_model,
                "batch_size": message.batch_size,
                "rounds": rounds,
                "steps": steps,
                "recallax": _summary(times, "recallax", first, message),
                "torch": _summary(times, mode, first, message),
                **times.ratio(mode, "recallax"),
                "difference": float(f"{differences[mode]:.1e}"),
                "other_cores": times.other_cores,
                **machine.describe_machine(),
                "versions": {**workers["recallax"].versions, **workers[mode].versions},
            }
        )
    return rows


def _summary(
    times: InterleavedTimes, side: str, first: dict[str, StepReply], message: TrainingMessage
) -> dict[str, float]:
    summary = times.summary(side)
    return {
        **summary,
        "tokens_per_second": round(1e3 * message.batch_size * message.length / summary["median_ms"]),
        "first_step_s": round(first[side].seconds[0], 2),
    }


def report(rows: Sequence[Row]) -> str:
    """Return the newest row of each setting, mixer, number of threads and mode as a Markdown table."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_speed", description="Training speed.")
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"), help="a Python with torch and numpy")
    parser.add_argument("--setting", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--mixer", choices=MIXERS, nargs="+", default=list(MIXERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=12, help="bursts that each side runs, besides one to warm up")
    parser.add_argument("--steps", type=int, default=10, help="steps in a burst")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the table of the results file, measure nothing")
    args = parser.parse_args(argv)
    if args.report:
        print(report([json.loads(line) for line in args.results.read_text().splitlines()]))
        return
    opponent, source = (machine.torch_python(args.torch_python), "-m", "benchmarks.torch_mqar"), git_commit()
    args.results.parent.mkdir(exist_ok=True)
    for setting, mixer, threads in product(args.setting, args.mixer, args.threads):
        vocab_size, length, pairs = SETTINGS[setting]
        message = TrainingMessage(
            mixer=mixer,
            vocab_size=vocab_size,
            length=length,
            pairs=pairs,
            threads=threads,
            steps=CHECKED + (args.rounds + 1) * args.steps,
        )
        rows = [{"setting": setting, **row, "commit": source} for row in measure(opponent, message, args.rounds)]
        with args.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(report(rows), flush=True)


if __name__ == "__main__":
    main()
