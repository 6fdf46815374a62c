"""Kimi Delta Attention on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: as Gated DeltaNet or better; no
published result for this width. `experiments/recall_vs_state` has results of a small version, at learning rates chosen
on valid. Cost: minutes on one H100.

    recallax train mqar_kda
    recallax train mqar_kda --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import KDA
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(KDA(num_heads=1), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(
        with_attention_blocks(zoology(KDA(num_heads=2, head_k_dim=6, head_v_dim=8), 16), window=5)
    )
