"""How much of MQAR's standard mixture does Gated DeltaNet recall?

Width 64, behind a short convolution. Expected: as DeltaNet; sensitive to the learning
rate (.06, .09 and .97 over three rates in one published run).
`experiments/recall_vs_state` has what a small version reaches, at rates chosen on valid. Cost: minutes on one H100.

    recallax train mqar_gated_delta_net
    recallax train mqar_gated_delta_net --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import GatedDeltaNet
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(GatedDeltaNet(num_heads=1, head_k_dim=64, head_v_dim=64), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(
        with_attention_blocks(
            zoology(GatedDeltaNet(num_heads=1, num_v_heads=2, head_k_dim=4, head_v_dim=6), 16), window=5
        )
    )
