"""How much of MQAR's standard mixture does gated linear attention (a decay per channel) recall?

Width 64, behind a short convolution. Expected: no published number for this width and state.
`experiments/recall_vs_state` has what a small version reaches, at rates chosen on valid. Cost: minutes on one H100.

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
