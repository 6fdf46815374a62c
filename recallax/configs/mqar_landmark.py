"""Landmark attention on the standard mixture of MQAR.

Question: does it recall as much as full attention, if a query reads four selected blocks of 16 tokens and its own?
Width 64, after a short convolution, without positions. Training, and the accuracy that training reports, use the
grouped softmax over all blocks. Expected: 1.00 as `mqar_attention` (no published result: the paper has no MQAR).
Cost: minutes on one H100.

    recallax train mqar_landmark
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Landmark
from recallax.models.zoology_lm import zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(zoology(Landmark(block_size=15, rope_theta=None, top_k=4), 64))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(zoology(Landmark(block_size=3, num_heads=2, num_kv_heads=1, top_k=4), 16))
