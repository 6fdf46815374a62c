"""Sliding-window attention over 64 tokens on the standard mixture of MQAR.

Question: which share of the queries has its value within the window? This checks the task generator and the window.
Width 128. Expected: mean test accuracy 0.51 over the seven slices (0.145 at window 16, 0.80 at 256).
Cost: minutes on one H100.

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
