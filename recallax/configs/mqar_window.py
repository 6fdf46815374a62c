"""How much of MQAR's standard mixture lies within a sliding window of 64 tokens?

Width 128. Expected: mean test accuracy .51 over the seven slices (.145 at window 16, .80 at 256): the share of
queries whose value is in reach, so this checks generator and window at once. Cost: minutes on one H100.

    recallax train mqar_window
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import SlidingWindow
from recallax.models.zoology_lm import zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(zoology(SlidingWindow(window=64, rope_theta=None), 128))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(zoology(SlidingWindow(window=5, rope_theta=None), 16))
