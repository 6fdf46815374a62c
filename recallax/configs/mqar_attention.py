"""Does softmax attention solve MQAR's standard mixture?

Width 64. Expected: mean test accuracy 1.00 over the seven slices (BASED, arXiv 2402.18668, figure 2).
Cost: minutes on one H100.

    recallax train mqar_attention
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import Attention
from recallax.models.zoology import zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(zoology(Attention(rotary_base=None), 64))


def get_tiny() -> RunConfig:
    return standard_tiny(zoology(Attention(heads=2, kv_heads=1), 16))
