"""How much of MQAR's standard mixture does Gated DeltaProduct with two steps per token recall?

Width 64, behind a short convolution. Expected: as Gated DeltaNet: recall does not need a second reflection.
Cost: minutes on one H100.

    recallax train mqar_gated_delta_product
    recallax train mqar_gated_delta_product --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import GatedDeltaProduct
from recallax.models.zoology import with_attention, zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(GatedDeltaProduct(heads=1, key_dim=64, value_dim=64), 64)))


def get_tiny() -> RunConfig:
    return standard_tiny(with_attention(zoology(GatedDeltaProduct(heads=2, key_dim=4, value_dim=6), 16), window=5))
