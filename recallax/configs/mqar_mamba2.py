"""Mamba-2 on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: no published result for this width and
state. `experiments/recall_vs_state` has results of a small version, at learning rates chosen on valid.
Cost: minutes on one H100.

    recallax train mqar_mamba2
    recallax train mqar_mamba2 --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Mamba2
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(Mamba2(state_dim=64, head_dim=64), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(
        with_attention_blocks(zoology(Mamba2(state_dim=6, head_dim=8, num_groups=2), 16), window=5)
    )
