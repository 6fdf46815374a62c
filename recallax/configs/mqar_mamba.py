"""How much of MQAR's standard mixture does Mamba-1 (element-wise states) recall?

Width 64, behind a short convolution. Expected: below the matrix memories; no published
number for this width.
Cost: minutes on one H100.

    recallax train mqar_mamba
    recallax train mqar_mamba --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import Mamba
from recallax.models.zoology import with_attention, zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(Mamba(), 64)))


def get_tiny() -> RunConfig:
    return standard_tiny(with_attention(zoology(Mamba(state_dim=3), 16), window=5))
