"""Accuracy against bytes of state: ten mixers on `mqar_micro`, then the best of them at a larger size.

Stages: a grid of seven learning rates with one seed; the rate that is best on valid with two other seeds; the same rate
at vocabulary 256, length 64, 8 pairs, width 64.
"""

import dataclasses

from experiments.cell import Cell, Row, Stage, at_best_rate, rates_then_seeds
from recallax.configs import mqar_micro
from recallax.layers import Attention, Based, LinearAttention, MixerConfig, SlidingWindow
from recallax.models.zoology import zoology
from recallax.tasks import MQAR, Segment
from recallax.train.run import AdamW, Evaluate, RunConfig, Train

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
MIXERS: dict[str, MixerConfig] = {
    "based 4": Based(feature_dim=4),
    "based 8": Based(feature_dim=8),
    "based 16": Based(feature_dim=16),
    "linear elu": LinearAttention(feature_map="elu"),
    "linear identity": LinearAttention(feature_map="identity"),
    "window 4": SlidingWindow(window=4, rotary_base=None),
    "window 8": SlidingWindow(window=8, rotary_base=None),
    "window 16": SlidingWindow(window=16, rotary_base=None),
    "window 24": SlidingWindow(window=24, rotary_base=None),
    "attention": Attention(rotary_base=None),
}
SMALL = ("attention", "based 16", "based 8", "linear elu")


def micro(name: str, rate: float, seed: int) -> RunConfig:
    return micro_of(MIXERS[name], rate, seed)


def micro_of(mixer: MixerConfig, rate: float, seed: int) -> RunConfig:
    """`mqar_micro` with this mixer."""
    config = mqar_micro.get_config()
    return dataclasses.replace(
        config,
        model=zoology(mixer, 32),
        optim=AdamW(lr=rate),
        train=dataclasses.replace(config.train, seed=seed, data_seed=seed),
    )


def small(name: str, rate: float, seed: int) -> RunConfig:
    slices = (Segment(length=64, pairs=8),)
    return RunConfig(
        task=MQAR(vocab_size=256, mixture=slices, test_mixture=slices),
        model=zoology(MIXERS[name], 64),
        optim=AdamW(lr=rate),
        train=Train(steps=2000, batch_size=64, seed=seed, data_seed=seed),
        evaluate=Evaluate(batches=16),
    )


def larger(rows: list[Row]) -> list[Cell]:
    return at_best_rate("small", SMALL, small, rows)


STAGES: tuple[Stage, ...] = (*rates_then_seeds(MIXERS, RATES, micro), larger)
