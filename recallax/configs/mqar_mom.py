"""Mixture of Memories on the standard mixture of MQAR.

Question: how much does it recall? Four Gated DeltaNet memories, of which each token uses two, and a shared one. Width
64, after a short convolution. Expected: more than one such memory where its state is too small; no published result
(the paper has no MQAR). `experiments/recall_vs_state` has results of a small version, at learning rates chosen on
valid. Cost: minutes on one H100.

    recallax train mqar_mom
    recallax train mqar_mom --model.pattern "conv (mixer*3 window)*2"      a hybrid, 3:1
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import GatedDeltaNet, MoM
from recallax.models.zoology_lm import with_attention_blocks, zoology
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    mixer = MoM(memory=GatedDeltaNet(num_heads=1, head_k_dim=32, head_v_dim=32), num_memories=4, top_k=2)
    return mqar_standard(with_attention_blocks(zoology(mixer, 64)))


def get_tiny() -> RunConfig:
    mixer = MoM(memory=GatedDeltaNet(num_heads=2, head_k_dim=4, head_v_dim=6), num_memories=3, top_k=2)
    return mqar_standard_tiny(with_attention_blocks(zoology(mixer, 16), window=5))
