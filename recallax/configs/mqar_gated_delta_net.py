"""Gated DeltaNet on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: as DeltaNet, and sensitive to the
learning rate (0.06, 0.09 and 0.97 at three rates in one published run). `experiments/recall_vs_state` has results of a
small version, at learning rates chosen on valid. Cost: minutes on one H100.

    recallax train mqar_gated_delta_net
    recallax train mqar_gated_delta_net --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import GatedDeltaNet
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(GatedDeltaNet(num_heads=1, head_k_dim=64, head_v_dim=64), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(
        with_attention_blocks(
            zoology(GatedDeltaNet(num_heads=1, num_v_heads=2, head_k_dim=4, head_v_dim=6), 16), window=5
        )
    )
