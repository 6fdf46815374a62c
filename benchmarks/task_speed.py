"""Compare how fast MQAR batches are generated with a loop over rows: `taskset -c 0 python -m benchmarks.task_speed`.

The opponent draws each row's keys, values and slots with `choice`: of numpy's old `RandomState`, as the published
generator does (it permutes half the vocabulary for a handful of keys), and of its `Generator`, the best a loop can
do. All run in one process, alternately, on the same slice of the standard mixture at a vocabulary of 8192.

On one core of a shared AMD EPYC (numpy 2.5.5, Python 3.12) 2^20 tokens took 0.03 to 0.09 s, median of 5, filler
included. The first loop took 48 times as long at (length, pairs) = (64, 4), 15 times at (256, 32) and 5 times at
(1024, 256); the second 17, 7 and 3 times.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from recallax.tasks import MQAR

TOKENS = 2**20
LOOP_ROWS = 128
REPEATS = 5
type RandomSource = np.random.Generator | np.random.RandomState


def mqar_rows_by_loop(
    rng: RandomSource, rows: int, length: int, pairs: int, vocab_size: int, power: float
) -> np.ndarray:
    """Generate MQAR rows with uniform filler, one after the other.

    Args:
        rng: The generator under test.
        rows: How many.
        length: Tokens of a row.
        pairs: Keys with values in a row.
        vocab_size: Ids; keys are from the lower half, values from the upper.
        power: Of the distribution of the queries' distances.

    Returns:
        Ids, [rows, length].
    """
    half, slots = vocab_size // 2, (length - 2 * pairs) // 2
    weight = np.arange(1, slots + 1) ** (power - 1)
    tokens = (rng.random((rows, length)) * vocab_size).astype(np.int32)
    for row in tokens:
        keys = rng.choice(np.arange(1, half), pairs, replace=False)
        row[0 : 2 * pairs : 2] = keys
        row[1 : 2 * pairs : 2] = rng.choice(np.arange(half, vocab_size), pairs, replace=False)
        row[2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=weight / weight.sum())] = keys
    return tokens


def elapsed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(length: int, pairs: int) -> list[float]:
    """Measure one slice of the mixture.

    Args:
        length: Tokens of a row.
        pairs: Keys with values in a row.

    Returns:
        Least and median seconds of `MQAR` per `TOKENS` tokens, and the median ratios of the two loops to it.
    """
    task = MQAR.single(length=length, num_kv_pairs=pairs)
    opponents: list[RandomSource] = [np.random.RandomState(0), np.random.default_rng(0)]
    ours: list[float] = []
    ratios: list[list[float]] = [[], []]
    for index in range(REPEATS):
        ours.append(elapsed(partial(task.batch, 0, "train", index, TOKENS // length)))
        for rng, ratio in zip(opponents, ratios, strict=True):
            took = elapsed(partial(mqar_rows_by_loop, rng, LOOP_ROWS, length, pairs, task.vocab_size, task.power_a))
            ratio.append(took * TOKENS / (LOOP_ROWS * length) / ours[-1])
    return [min(ours), statistics.median(ours), *map(statistics.median, ratios)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.task_speed", description=(__doc__ or "").split(":")[0] + "."
    )
    parser.parse_args(argv)
    print(f"numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}; 2^20 tokens per slice")
    print(f"{'length':>6} {'pairs':>5} {'min s':>7} {'median s':>8} {'RandomState loop':>16} {'Generator loop':>14}")
    for length, pairs in MQAR().slices:
        least, median, old, new = measure(length, pairs)
        print(f"{length:>6} {pairs:>5} {least:>7.3f} {median:>8.3f} {old:>15.0f}x {new:>13.1f}x")


if __name__ == "__main__":
    main()
