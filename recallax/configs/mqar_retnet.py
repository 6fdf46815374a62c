"""RetNet, with a constant decay per head and no gates, on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: less than gated mixers, because its
decay does not depend on the tokens. Cost: minutes on one H100.

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
