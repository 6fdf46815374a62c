"""Gated DeltaProduct with two Householder steps per token on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: as Gated DeltaNet, because recall does
not need a second reflection. Cost: minutes on one H100.

    recallax train mqar_gated_delta_product
    recallax train mqar_gated_delta_product --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import GatedDeltaProduct
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(
        with_attention_blocks(zoology(GatedDeltaProduct(num_heads=1, head_k_dim=64, head_v_dim=64), 64))
    )


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(
        with_attention_blocks(zoology(GatedDeltaProduct(num_heads=2, head_k_dim=4, head_v_dim=6), 16), window=5)
    )
