"""Recall accuracy against bytes of state for attention, windows, BASED and linear attention.

Ten mixers on `mqar_micro`. Stages: seven learning rates with one seed; the best on valid with two other seeds; and the
best mixers with the same learning rate at vocabulary 256, length 64, 8 pairs and width 64.
"""

import dataclasses

from experiments.sweep_stages import lr_grid_then_seeds, seeds_at_best_lr
from recallax.configs import mqar_micro
from recallax.layers import Attention, Based, LinearAttention, MixerConfig, SlidingWindow
from recallax.models.zoology_lm import zoology
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
MIXERS: dict[str, MixerConfig] = {
    "based 4": Based(feature_dim=4),
    "based 8": Based(feature_dim=8),
    "based 16": Based(feature_dim=16),
    "linear elu": LinearAttention(feature_map="elu"),
    "linear identity": LinearAttention(feature_map="identity"),
    "window 4": SlidingWindow(window=4, rope_theta=None),
    "window 8": SlidingWindow(window=8, rope_theta=None),
    "window 16": SlidingWindow(window=16, rope_theta=None),
    "window 24": SlidingWindow(window=24, rope_theta=None),
    "attention": Attention(rope_theta=None),
}
LARGER_SIZE_MIXERS = ("attention", "based 16", "based 8", "linear elu")


def mqar_micro_config(name: str, rate: float, seed: int) -> RunConfig:
    """Return the run of one of `MIXERS` at a learning rate."""
    return mqar_micro_with_mixer(MIXERS[name], rate, seed)


def mqar_micro_with_mixer(mixer: MixerConfig, rate: float, seed: int) -> RunConfig:
    """Return `mqar_micro` with another mixer.

    Args:
        mixer: The mixer.
        rate: Peak learning rate.
        seed: Seed of the parameters and of the data.

    Returns:
        The run.
    """
    config = mqar_micro.get_config()
    return dataclasses.replace(
        config,
        model=zoology(mixer, 32),
        optim=AdamW(lr=rate),
        train=dataclasses.replace(config.train, seed=seed, data_seed=seed),
    )


def larger_config(name: str, rate: float, seed: int) -> RunConfig:
    """Return the run of one of `MIXERS` at the larger size."""
    slices = (MixtureSlice(length=64, num_kv_pairs=8),)
    return RunConfig(
        task=MQAR(vocab_size=256, mixture=slices, test_mixture=slices),
        model=zoology(MIXERS[name], 64),
        optim=AdamW(lr=rate),
        train=Train(steps=2000, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=16),
    )


def larger_size(rows: list[ResultRow]) -> list[Trial]:
    """Return two seeds of the best mixers at the larger size."""
    return seeds_at_best_lr("small", LARGER_SIZE_MIXERS, larger_config, rows)


def earlier_best_rate(rows: list[ResultRow]) -> list[Trial]:
    """Return the seeds at 0.032, which was the best rate of two mixers in an earlier measurement of the grid."""
    return [
        Trial({"stage": stage, "mixer": name, "lr": 3.2e-2, "seed": seed}, config(name, 3.2e-2, seed))
        for stage, config in (("seeds", mqar_micro_config), ("small", larger_config))
        for name in ("based 16", "linear elu")
        for seed in (1, 2)
    ]


STAGES: tuple[SweepStage, ...] = (*lr_grid_then_seeds(MIXERS, RATES, mqar_micro_config), larger_size)
EARLIER_STAGES: tuple[SweepStage, ...] = (earlier_best_rate,)
"""Stages whose rows are kept and that the sweep no longer runs."""
