"""Gated linear attention, with a decay per channel, on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: no published result for this width and
state. `experiments/recall_vs_state` has results of a small version, at learning rates chosen on valid.
Cost: minutes on one H100.

    recallax train mqar_gla
    recallax train mqar_gla --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import GLA
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(GLA(num_heads=1, conv_size=4), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(with_attention_blocks(zoology(GLA(num_heads=2, gate_low_rank_dim=4), 16), window=5))
