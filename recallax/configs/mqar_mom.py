"""How much of MQAR's standard mixture does a Mixture of Memories recall?

Four Gated DeltaNet cells, of which each token takes two, and a shared one. Width 64, behind a short convolution.
Expected: above its single cell where that is short of state; no published number (the paper has no MQAR).
`experiments/recall_vs_state` has what a small version reaches, at rates chosen on valid. Cost: minutes on one H100.

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
