"""HGRN2, whose key is tied to the forget gate, on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: no published result for this width and
state. Cost: minutes on one H100.

    recallax train mqar_hgrn2
    recallax train mqar_hgrn2 --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import HGRN2
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(HGRN2(num_heads=1), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(with_attention_blocks(zoology(HGRN2(num_heads=2), 16), window=5))
