"""Does a sliding window recall exactly what lies within its reach?

Windows of 16, 24, 32 and 48 tokens on MQAR with vocabulary 256, length 64 and 8 pairs, width 64. The rate is the one
that `recall_frontier` found best on valid for a window of 16 on `mqar_micro`; two seeds.
"""

import dataclasses

import numpy as np

from recallax.layers import SlidingWindow
from recallax.models.zoology_lm import zoology
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train

RATE = 8e-3
WINDOWS = (16, 24, 32, 48)
TASK = MQAR(
    vocab_size=256,
    mixture=(MixtureSlice(length=64, num_kv_pairs=8),),
    test_mixture=(MixtureSlice(length=64, num_kv_pairs=8),),
)


def fraction_within_window(task: MQAR, window: int, rows: int = 4096) -> float:
    """Share of queries whose value stands within the last `window` tokens, the query itself included: the mean over the
    segments of the test mixture, so many rows of each."""
    return float(np.mean([_slice_fraction_within_window(task, segment, window, rows) for segment in task.test_mixture]))


def _slice_fraction_within_window(task: MQAR, mixture_slice: MixtureSlice, window: int, rows: int) -> float:
    batch = dataclasses.replace(task, test_mixture=(mixture_slice,)).batch(0, "test", 0, rows)
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.weights)
    row, query = np.nonzero(weights)
    context = tokens[:, : 2 * mixture_slice.num_kv_pairs]
    value = np.argmax(context[row, 0::2] == tokens[row, query][:, None], axis=1) * 2 + 1
    return float(np.mean(query - value < window))


def predicted_accuracy(window: int) -> float:
    """Reach, and for the rest a guess among the values of the vocabulary."""
    within = fraction_within_window(TASK, window)
    return within + (1 - within) / (TASK.vocab_size // 2)


def cells(rows: list[ResultRow]) -> list[Trial]:
    return [
        Trial(
            {"stage": "reach", "window": window, "lr": RATE, "seed": seed},
            RunConfig(
                task=TASK,
                model=zoology(SlidingWindow(window=window, rope_theta=None), 64),
                optim=AdamW(lr=RATE),
                train=Train(steps=2000, batch_size=64, seed=seed, data_seed=seed),
                evaluate=Evaluate(batches=16),
            ),
        )
        for window in WINDOWS
        for seed in (1, 2)
    ]


STAGES: tuple[SweepStage, ...] = (cells,)
