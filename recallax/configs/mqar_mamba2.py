"""How much of MQAR's standard mixture does Mamba-2 recall?

Width 64, behind a short convolution. Expected: no published number for this width and state.
`experiments/recall_vs_state` has what a small version reaches, at rates chosen on valid. Cost: minutes on one H100.

    recallax train mqar_mamba2
    recallax train mqar_mamba2 --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import Mamba2
from recallax.models.zoology import with_attention, zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(Mamba2(state_dim=64, head_dim=64), 64)))


def get_tiny() -> RunConfig:
    return standard_tiny(with_attention(zoology(Mamba2(state_dim=6, head_dim=8, groups=2), 16), window=5))
