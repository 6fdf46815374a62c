"""Run a question's sweep, or draw its report: `python -m experiments recall_frontier [--report]`.

Rows go to `experiments/<question>/results.jsonl` as they are measured; cells that have a row already are skipped, so
an interrupted sweep goes on where it stopped, and a crashed cell is tried again next time. Cells run in processes of
one thread each, which on small models is faster than one process with all cores.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from experiments.train_cell import ResultRow, SweepStage, Trial, train_and_evaluate
from recallax.config import fingerprint, suggest_name

FOLDER = Path(__file__).parent


def main() -> int:
    questions = sorted(p.parent.name for p in FOLDER.glob("*/sweep.py"))
    parser = argparse.ArgumentParser(prog="python -m experiments", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("question", help=", ".join(questions))
    parser.add_argument("--report", action="store_true", help="make tables and figures from the rows there are")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cells at a time")
    arguments = parser.parse_args()
    if arguments.question not in questions:
        parser.error(f"there is no question {arguments.question!r}{suggest_name(arguments.question, questions)}")
    folder = FOLDER / arguments.question
    if arguments.report:
        importlib.import_module(f"experiments.{arguments.question}.report").main(read_rows(folder), folder)
        return 0
    stages: list[SweepStage] = importlib.import_module(f"experiments.{arguments.question}.sweep").STAGES
    return sum(run_cells(stage(read_rows(folder)), folder, arguments.workers) for stage in stages)


def read_rows(folder: Path) -> list[ResultRow]:
    """The rows measured so far."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_cells(cells: list[Trial], folder: Path, workers: int) -> int:
    """Measure the cells that have no row yet; the number that failed."""
    known = {row["config"] for row in read_rows(folder)}
    todo = [cell for cell in cells if fingerprint(cell.config) not in known]
    print(f"{folder.name}: {len(todo)} of {len(cells)} cells to measure", flush=True)
    failed = 0
    os.environ |= {"PJRT_NPROC": "1", "NPROC": "1", "OMP_NUM_THREADS": "1"}  # read by the workers when they import jax
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train_and_evaluate, cell): cell for cell in todo}
        for done, future in enumerate(as_completed(futures), 1):
            labels = dict(futures[future].labels)
            try:
                row = future.result()
            except Exception:
                failed += 1
                print(f"[{done}/{len(todo)}] {labels} FAILED\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                continue
            with (folder / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"[{done}/{len(todo)}] {labels} valid {row['valid']['accuracy']:.3f} in {row['seconds']:.0f} s",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
