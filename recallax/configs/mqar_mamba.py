"""How much of MQAR's standard mixture does Mamba-1 (element-wise states) recall?

Width 64, behind a short convolution. Expected: below the matrix memories; no published
number for this width.
Cost: minutes on one H100.

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
