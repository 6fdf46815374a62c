"""Time per training step against PyTorch, in turns on the same cores. `benchmarks/README.md` says what is measured.

    python -m benchmarks.train_speed --torch-python PATH     measure, and append rows to results/train_speed.jsonl
    python -m benchmarks.train_speed --report                the newest rows as a table

PATH is a Python that has torch and numpy; the environment variable TORCH_PYTHON does as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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


def measure(python: str, setting: str, mixer: str, threads: int, rounds: int, steps: int) -> Iterator[Row]:
    """Rows of one model at one size: a row per mode of the opponent."""
    vocab_size, length, pairs = SETTINGS[setting]
    total = CHECKED + (rounds + 1) * steps
    job = Job(mixer=mixer, vocab_size=vocab_size, length=length, pairs=pairs, threads=threads, steps=total)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job.write(folder)

        def start(name: str, *command: str) -> Worker:
            worker = Worker(name, (*command[:1], "-m", *command[1:]), threads, folder)
            stack.callback(worker.close)
            return worker

        ours = start("recallax", sys.executable, "benchmarks.recallax_mqar", str(folder))
        opponents = {mode: start(mode, python, "benchmarks.torch_mqar", str(folder), mode) for mode in MODES}
        first = ours.steps(CHECKED)
        checks = {mode: opponent.steps(CHECKED) for mode, opponent in opponents.items()}
        differences = {mode: agree(mode, first, answer) for mode, answer in checks.items()}
        load = os.getloadavg()[0]
        blocks: dict[str, list[list[float]]] = {name: [] for name in ("recallax", *MODES)}
        for turn in range(rounds + 1):  # the first round is warm-up
            for name, worker in {"recallax": ours, **opponents}.items():
                seconds = worker.steps(steps).seconds
                if turn:
                    blocks[name].append(seconds)
        for mode in MODES:
            pairs_of_blocks = zip(blocks["recallax"], blocks[mode], strict=True)
            ratios = [statistics.median(b) / statistics.median(a) for a, b in pairs_of_blocks]
            yield {
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
                "recallax": _summary(blocks["recallax"], first, job),
                "torch": _summary(blocks[mode], checks[mode], job),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
                "difference": float(f"{differences[mode]:.1e}"),
                "load": round(load, 2),
                "device": _processor(),
                "cpus": os.cpu_count(),
                "versions": {**ours.versions, **opponents[mode].versions},
            }


def _summary(blocks: Sequence[Sequence[float]], first: Answer, job: Job) -> dict[str, float]:
    seconds = [x for block in blocks for x in block]
    median = statistics.median(seconds)
    return {
        "min_ms": round(1e3 * min(seconds), 3),
        "median_ms": round(1e3 * median, 3),
        "tokens_per_second": round(job.batch_size * job.length / median),
        "first_step_s": round(first.seconds[0], 2),
    }


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
    head = "size | model | threads | opponent | recallax ms | torch ms | recallax tokens/s | torch ÷ recallax | rounds"
    lines = [f"| {head} |", "|---|---|--:|---|--:|--:|--:|--:|--:|"]
    for key in product(SETTINGS, MIXERS, (2, 1), MODES):
        if key not in newest:
            continue
        row = newest[key]
        ours, theirs = ([f"{row[side][k]:.1f}" for k in ("min_ms", "median_ms")] for side in ("recallax", "torch"))
        low, high = row["ratios"]
        cells = (*key, " / ".join(ours), " / ".join(theirs), f"{row['recallax']['tokens_per_second']:,}")
        lines.append("| " + " | ".join(map(str, (*cells, f"**{row['ratio']:.2f}**", f"{low:.2f}–{high:.2f}"))) + " |")
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
