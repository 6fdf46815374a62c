"""How much of MQAR's standard mixture does Griffin's RG-LRU recall?

Width 64, behind a short convolution. Expected: near chance beyond a few pairs, since
one number per channel has no room for an association.
Cost: minutes on one H100.

    recallax train mqar_rg_lru
    recallax train mqar_rg_lru --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import RGLRU
from recallax.models.zoology import with_attention, zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(RGLRU(heads=4, width=128), 64)))


def get_tiny() -> RunConfig:
    return standard_tiny(with_attention(zoology(RGLRU(heads=2), 16), window=5))
