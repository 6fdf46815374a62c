"""How much of MQAR's standard mixture does RetNet: a constant decay per head, no gates recall?

Width 64, behind a short convolution. Expected: a decay that no token can hold
back costs recall.
Cost: minutes on one H100.

    recallax train mqar_retnet
    recallax train mqar_retnet --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import RetNet
from recallax.models.zoology import with_attention, zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(RetNet(heads=2, value_dim=32), 64)))


def get_tiny() -> RunConfig:
    return standard_tiny(with_attention(zoology(RetNet(heads=2, key_dim=4, value_dim=8), 16), window=5))
