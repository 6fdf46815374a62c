"""Mamba, with element-wise states, on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: less than matrix-valued states; no
published result for this width. Cost: minutes on one H100.

    recallax train mqar_mamba
    recallax train mqar_mamba --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Mamba
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(Mamba(), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(with_attention_blocks(zoology(Mamba(state_dim=3), 16), window=5))
