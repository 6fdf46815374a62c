"""Softmax attention on the standard mixture of MQAR.

Question: does it solve the task? Width 64. Expected: mean test accuracy 1.00 over the seven slices (BASED, arXiv
2402.18668, figure 2). Cost: minutes on one H100.

    recallax train mqar_attention
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Attention
from recallax.models.zoology_lm import zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(zoology(Attention(rope_theta=None), 64))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(zoology(Attention(num_heads=2, num_kv_heads=1), 16))
