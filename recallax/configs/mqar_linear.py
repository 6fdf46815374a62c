"""Linear attention with the feature map elu + 1 on the standard mixture of MQAR.

Question: how much does it recall? Width 64. Expected: less than BASED at equal bytes of state; no published result for
this width. Cost: minutes on one H100.

    recallax train mqar_linear
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import LinearAttention
from recallax.models.zoology_lm import zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(zoology(LinearAttention(feature_map="elu"), 64))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(zoology(LinearAttention(feature_map="elu", num_heads=2, feature_dim=4), 16))
