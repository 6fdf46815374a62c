"""Does a sliding window recall exactly the pairs that it covers?

Windows of 16, 24, 32 and 48 tokens on MQAR with vocabulary 256, length 64 and 8 pairs, at width 64. The learning rate
is the best one of a window of 16 on `mqar_micro` in `recall_frontier`, with two seeds.
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
    """Measure the fraction of queries whose value is within the window.

    Args:
        task: The task.
        window: Tokens that the query sees, the query included.
        rows: Number of rows of each slice of the test mixture.

    Returns:
        The mean over the slices.
    """
    return float(np.mean([_slice_fraction_within_window(task, part, window, rows) for part in task.test_mixture]))


def _slice_fraction_within_window(task: MQAR, mixture_slice: MixtureSlice, window: int, rows: int) -> float:
    batch = dataclasses.replace(task, test_mixture=(mixture_slice,)).batch(0, "test", 0, rows)
    tokens, weights = np.asarray(batch.tokens), np.asarray(batch.weights)
    row, query = np.nonzero(weights)
    context = tokens[:, : 2 * mixture_slice.num_kv_pairs]
    value = np.argmax(context[row, 0::2] == tokens[row, query][:, None], axis=1) * 2 + 1
    return float(np.mean(query - value < window))


def predicted_accuracy(window: int) -> float:
    """Predict the accuracy of a window from the generator.

    Args:
        window: Tokens that a query sees, the query included.

    Returns:
        The fraction of values within the window, with a random value of the vocabulary for the others.
    """
    within = fraction_within_window(TASK, window)
    return within + (1 - within) / (TASK.vocab_size // 2)


def all_trials(rows: list[ResultRow]) -> list[Trial]:
    """Return every window and seed."""
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


STAGES: tuple[SweepStage, ...] = (all_trials,)
