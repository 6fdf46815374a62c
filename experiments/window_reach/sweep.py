"""Does a sliding window recall exactly what lies within its reach?

Windows of 16, 24, 32 and 48 tokens on MQAR with vocabulary 256, length 64 and 8 pairs, width 64. The rate is the one
that `recall_frontier` found best on valid for a window of 16 on `mqar_micro`; two seeds.
"""

import dataclasses

import numpy as np

from experiments.cell import Cell, Row, Stage
from recallax.layers import SlidingWindow
from recallax.models.zoology import zoology
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train

RATE = 8e-3
WINDOWS = (16, 24, 32, 48)
TASK = MQAR(vocab_size=256, mixture=(Segment(length=64, pairs=8),), test_mixture=(Segment(length=64, pairs=8),))


def reach(task: MQAR, window: int, rows: int = 4096) -> float:
    """Share of queries whose value stands within the last `window` tokens, the query itself included: the mean over the
    segments of the test mixture, so many rows of each."""
    return float(np.mean([_reach(task, segment, window, rows) for segment in task.test_mixture]))


def _reach(task: MQAR, segment: Segment, window: int, rows: int) -> float:
    batch = dataclasses.replace(task, test_mixture=(segment,)).batch(0, "test", 0, rows)
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.weights)
    row, query = np.nonzero(weights)
    context = tokens[:, : 2 * segment.pairs]
    value = np.argmax(context[row, 0::2] == tokens[row, query][:, None], axis=1) * 2 + 1
    return float(np.mean(query - value < window))


def predicted(window: int) -> float:
    """Reach, and for the rest a guess among the values of the vocabulary."""
    within = reach(TASK, window)
    return within + (1 - within) / (TASK.vocab_size // 2)


def cells(rows: list[Row]) -> list[Cell]:
    return [
        Cell(
            {"stage": "reach", "window": window, "lr": RATE, "seed": seed},
            RunConfig(
                task=TASK,
                model=zoology(SlidingWindow(window=window, rotary_base=None), 64),
                optim=AdamW(lr=RATE),
                train=Train(steps=2000, batch_size=64, seed=seed, data_seed=seed),
                evaluate=Evaluate(batches=16),
            ),
        )
        for window in WINDOWS
        for seed in (1, 2)
    ]


STAGES: tuple[Stage, ...] = (cells,)
