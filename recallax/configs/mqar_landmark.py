"""Does landmark attention recall what full attention recalls, if a query reads four blocks of 16 tokens and its own?

MQAR's standard mixture, width 64, behind a short convolution, without positions. It is trained on the grouped softmax
over all blocks, and so is the accuracy that training reports. Expected: 1.00 like `mqar_attention` (no published
number: the paper has no MQAR). Cost: minutes on one H100.

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
