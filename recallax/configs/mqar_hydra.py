"""How much of MQAR's standard mixture does attention over a short window and a few chosen tokens recall?

Width 64, behind a short convolution; a window of 16 tokens and 32 chosen ones (Hydra, arXiv 2508.15099, has 256 and
512). Expected: no published number. Cost: minutes on one H100.

    recallax train mqar_hydra
"""

from dataclasses import replace

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import ChunkExperts, Nothing, ProductKeys, SparseGlobalAttention
from recallax.models import Block, LMConfig
from recallax.models.zoology import zoology
from recallax.train.run import RunConfig


def with_experts(model: LMConfig, experts: ChunkExperts, facts: ProductKeys) -> LMConfig:
    parts = {"experts": experts, "facts": facts}
    blocks = model.blocks | {name: Block(mixer=part, channel=Nothing()) for name, part in parts.items()}
    return replace(model, pattern="conv mixer experts facts", blocks=blocks)


def get_config() -> RunConfig:
    attention = SparseGlobalAttention(window=16, chosen=32, block=16)
    return standard(
        with_experts(
            zoology(attention, 64),
            ChunkExperts(experts=4, inner=64, chunk=16),
            ProductKeys(sub_keys=32, key_dim=32, value_dim=64),
        )
    )


def get_tiny() -> RunConfig:
    mixer = SparseGlobalAttention(window=3, chosen=2, block=2, heads=2, kv_heads=1, head_dim=6)
    experts = ChunkExperts(experts=3, top_k=2, inner=5, chunk=3)
    facts = ProductKeys(sub_keys=4, heads=2, key_dim=6, value_dim=5, top_k=3)
    return standard_tiny(with_experts(zoology(mixer, 16), experts, facts))
