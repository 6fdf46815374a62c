"""How much of MQAR's standard mixture does RetNet: a constant decay per head, no gates recall?

Width 64, behind a short convolution. Expected: a decay that no token can hold
back costs recall.
Cost: minutes on one H100.

    recallax train mqar_retnet
    recallax train mqar_retnet --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import RetNet
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(RetNet(num_heads=2, head_v_dim=32), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(
        with_attention_blocks(zoology(RetNet(num_heads=2, head_k_dim=4, head_v_dim=8), 16), window=5)
    )
