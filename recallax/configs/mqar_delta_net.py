"""DeltaNet on the standard mixture of MQAR.

Question: how much does it recall? Width 64, after a short convolution. Expected: close to attention where a state of
64 x 64 suffices. `experiments/recall_vs_state` has results of a small version, at learning rates chosen on valid.
Cost: minutes on one H100.

    recallax train mqar_delta_net
    recallax train mqar_delta_net --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import DeltaNet
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_standard(with_attention_blocks(zoology(DeltaNet(num_heads=1), 64)))


def get_tiny() -> RunConfig:
    return mqar_standard_tiny(with_attention_blocks(zoology(DeltaNet(num_heads=2), 16), window=5))
