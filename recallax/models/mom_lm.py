"""MoM's published language models (Du et al. 2025, arXiv 2502.13685 v4, appendix; sizes from the released configs).

The models have 24 layers of a Mixture of Memories over Gated DeltaNet (4 heads of 256, 4 memories of which a token uses
2, and a shared memory) and SwiGLU. Embeddings of 32,000 ids are untied, because only then the model has the 444M active
parameters of the paper (the released config ties them). Parameters in millions:

                 width  inner    total   active   embeddings  kv_proj  other mixer  SwiGLU   state per sequence
    mom_380m      1024   2048    545.1    444.0         65.5    252.6         75.9   151.0   128 MB (memories 126)
    mom_1b3       2048   5632   1618.4   1416.2        131.1    505.3        151.5   830.5   128 MB

With tied embeddings: 512.4 and 1552.9 in total, 411.2 and 1350.7 active. Active parameters are those of the memories
that a token uses.
"""

from dataclasses import replace

from recallax.layers import GatedDeltaNet, MoM, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.models.lm_head import Untied

VOCAB_SIZE = 32_000
"""Ids of a tokenizer like Mistral's."""


def mom_380m() -> LMConfig:
    """Return MoM-380M: 24 layers of width 1024.

    Returns:
        The model config.
    """
    return _mom(1024, 2048)


def mom_1b3() -> LMConfig:
    """Return MoM-1.3B: 24 layers of width 2048.

    Returns:
        The model config.
    """
    return _mom(2048, 5632)


def mom_hybrid(config: LMConfig, attention: Block, ratio: int = 7) -> LMConfig:
    """Replace MoM layers by attention, as in the paper's hybrid; the number of layers does not change.

    Args:
        config: The model config.
        attention: The block of the attention layers.
        ratio: MoM layers before each attention layer.

    Returns:
        The hybrid's config.
    """
    periods = len(config.layer_names) // (ratio + 1)
    remaining = len(config.layer_names) - periods * (ratio + 1)
    pattern = f"(mom*{ratio} attention)*{periods}" + (f" mom*{remaining}" if remaining else "")
    return replace(config, pattern=pattern, blocks=config.blocks | {"attention": attention})


def _mom(d_model: int, intermediate_size: int) -> LMConfig:
    memory = GatedDeltaNet(num_heads=4, head_k_dim=256, head_v_dim=256)
    block = Block(
        mixer=MoM(memory=memory, num_memories=4, top_k=2),
        channel=SwiGLU(expand=intermediate_size / d_model, multiple_of=256),
    )
    return LMConfig(
        d_model=d_model,
        vocab_size=VOCAB_SIZE,
        pattern="mom*24",
        blocks={"mom": block},
        lm_head=Untied(),
        compute_dtype="bfloat16",
    )
