"""Time per training step against PyTorch, in turns on the same cores. `benchmarks/README.md` says what is measured.

    python -m benchmarks.train_speed --torch-python PATH     measure, and append rows to results/train_speed.jsonl
    python -m benchmarks.train_speed --report                the newest rows as a table

PATH is a Python that has torch and numpy; the environment variable TORCH_PYTHON does as well.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.worker import Answer, Job, Worker
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


def torch_python(path: str | None) -> str:
    """The opponent's interpreter, executed once to see that it has torch."""
    if not path:
        sys.exit("no PyTorch to compare with: give --torch-python PATH or set TORCH_PYTHON")
    try:
        found = subprocess.run([path, "-c", "import numpy, torch"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--torch-python {path} cannot be run: {error}")
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:]
        sys.exit(f"--torch-python {path} cannot import torch and numpy: {' '.join(reason)}")
    return path


def agree(name: str, ours: Answer, theirs: Answer) -> float:
    """The largest relative difference of losses and gradient norms. Raises Disagreement.

    The first step must agree to 1e-4: model and gradient. Those after it to 1e-3: the optimizer, whose division by the
    root of tiny second moments magnifies rounding.
    """
    worst = 0.0
    for what, a, b in (("loss", ours.losses, theirs.losses), ("gradient norm", ours.norms, theirs.norms)):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
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
    job = Job(mixer=mixer, vocab_size=vocab_size, length=length, pairs=pairs, threads=threads, steps=total)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job.write(folder)
        workers: dict[str, Worker] = {}

        def start(name: str, *command: str) -> None:
            workers[name] = Worker(name, command, threads, folder)
            stack.callback(workers[name].close)

        start("recallax", sys.executable, "-m", "benchmarks.recallax_mqar", str(folder))
        for mode in MODES:
            start(mode, python, "-m", "benchmarks.torch_mqar", str(folder), mode)
        first = {name: worker.steps(CHECKED) for name, worker in workers.items()}
        differences = {mode: agree(mode, first["recallax"], first[mode]) for mode in MODES}
        for worker in workers.values():
            worker.steps(steps)
        begin, busy = time.perf_counter(), _busy_seconds()
        turns = [{name: worker.steps(steps) for name, worker in workers.items()} for _ in range(rounds)]
        own = sum(sum(answer.cpu_seconds) for turn in turns for answer in turn.values())
        others = (_busy_seconds() - busy - own) / (time.perf_counter() - begin)
    rows = []
    for mode in MODES:
        ratios = [_median(turn[mode]) / _median(turn["recallax"]) for turn in turns]
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
                "recallax": _summary([turn["recallax"] for turn in turns], first["recallax"], job),
                "torch": _summary([turn[mode] for turn in turns], first[mode], job),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
                "difference": float(f"{differences[mode]:.1e}"),
                "other_cores": round(others, 2),
                "device": _processor(),
                "cpus": os.cpu_count(),
                "versions": {**workers["recallax"].versions, **workers[mode].versions},
            }
        )
    return rows


def _median(answer: Answer) -> float:
    return statistics.median(answer.seconds)


def _summary(turns: Sequence[Answer], first: Answer, job: Job) -> dict[str, float]:
    seconds = [x for turn in turns for x in turn.seconds]
    cpu_seconds = [x for turn in turns for x in turn.cpu_seconds]
    median = statistics.median(seconds)
    return {
        "min_ms": round(1e3 * min(seconds), 3),
        "median_ms": round(1e3 * median, 3),
        "cpu_median_ms": round(1e3 * statistics.median(cpu_seconds), 3),
        "tokens_per_second": round(job.batch_size * job.length / median),
        "first_step_s": round(first.seconds[0], 2),
    }


def _busy_seconds() -> float:
    """What all processes together have used of all cores, so that rows can say how much was not ours; Linux only."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


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
    python, source = torch_python(args.torch_python), commit()
    args.results.parent.mkdir(exist_ok=True)
    for setting, mixer, threads in product(args.setting, args.mixer, args.threads):
        rows = [{**row, "commit": source} for row in measure(python, setting, mixer, threads, args.rounds, args.steps)]
        with args.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(report(rows), flush=True)


if __name__ == "__main__":
    main()
