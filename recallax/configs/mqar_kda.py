"""How much of MQAR's standard mixture does Kimi Delta Attention recall?

Width 64, behind a short convolution. Expected: as Gated DeltaNet or better; no published number for this width.
`experiments/recall_vs_state` has what a small version reaches, at rates chosen on valid. Cost: minutes on one H100.

    recallax train mqar_kda
    recallax train mqar_kda --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import KDA
from recallax.models.zoology import with_attention, zoology
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return standard(with_attention(zoology(KDA(heads=1), 64)))


def get_tiny() -> RunConfig:
    return standard_tiny(with_attention(zoology(KDA(heads=2, key_dim=6, value_dim=8), 16), window=5))
