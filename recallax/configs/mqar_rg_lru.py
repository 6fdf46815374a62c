"""The RG-LRU of Griffin on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: close to chance beyond a few pairs,
because a state of one number per channel cannot store associations. Cost: minutes on one H100.

    recallax train mqar_rg_lru
    recallax train mqar_rg_lru --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import RGLRU
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(RGLRU(num_heads=4, lru_width=128), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(with_attention_blocks(zoology(RGLRU(num_heads=2), 16), window=5))
