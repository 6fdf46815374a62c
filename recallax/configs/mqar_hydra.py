"""Hydra on the standard mixture of MQAR, with all of its parts or with one of them.

Question: how much does each part recall, together with the state-space model alone and with all parts? Width 64; a
window of 16 tokens and 32 selected ones, 4 experts per chunks of 16 tokens, a workspace of 16 slots, 1,024 slots of
product keys (Hydra, arXiv 2508.15099, at the size of MQAR). Expected: no published result; the state-space model has 64
states, so that attention and the workspace determine the recall. Cost: minutes on one H100.

    recallax train mqar_hydra
    recallax train mqar_hydra --model.pattern "ssm*4"                   the state-space model alone
    recallax train mqar_hydra --model.pattern "(ssm attention)*2"       or (ssm experts)*2, (ssm*2 workspace)*2
    recallax train mqar_hydra --model.pattern "(delta attention)*2"     another recurrence
    recallax train mqar_hydra --model.pattern "(ssm asked)*2"           another selector; or keys, landmark
"""

from dataclasses import replace

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import (
    ChunkExperts,
    DiagonalSSM,
    GatedDeltaNet,
    KeyScore,
    Landmark,
    LongMamba,
    NoChannelMixer,
    Parallel,
    ProductKeys,
    QueryDependentSelector,
    SparseGlobalAttention,
    Workspace,
)
from recallax.models import Block, LMConfig
from recallax.models.hydra_lm import ABLATIONS, hydra_blocks
from recallax.train.run_config import RunConfig

EXPERTS = ChunkExperts(num_experts=4, intermediate_size=64, chunk_size=16)


def add_hydra_variants(
    blocks: dict[str, Block], ssm: DiagonalSSM, attention: SparseGlobalAttention
) -> dict[str, Block]:
    """Return the blocks, and additional ones with other selectors, routes and recurrences.

    Args:
        blocks: The blocks of the model.
        ssm: The state-space model of every additional block that keeps it.
        attention: The sparse global attention that the selectors vary.
    """
    others = {
        "asked": Parallel(ssm=ssm, attention=replace(attention, selector=QueryDependentSelector(), cache="full")),
        "keys": Parallel(ssm=ssm, attention=replace(attention, selector=KeyScore())),
        "landmark": Parallel(ssm=ssm, attention=Landmark(block_size=15, top_k=2)),
        "by_previous": Parallel(ssm=ssm, experts=replace(EXPERTS, route="previous_chunk")),
        "by_token": Parallel(ssm=ssm, experts=replace(EXPERTS, route="token")),
        "long": Parallel(ssm=LongMamba(mixer=ssm, training_length=256, context_length=1024)),
        "delta": Parallel(ssm=GatedDeltaNet(num_heads=1)),
    }
    return blocks | {name: Block(mixer=mixer, channel=NoChannelMixer()) for name, mixer in others.items()}


def get_config() -> RunConfig:
    ssm, attention = DiagonalSSM(max_timescale=256.0), SparseGlobalAttention(window=16, top_k=32, block_size=16)
    workspace = Workspace(num_slots=16, slot_dim=64, chunk_size=16)
    facts = ProductKeys(num_sub_keys=32, num_heads=2, head_k_dim=32, value_dim=64, top_k=8)
    blocks = add_hydra_variants(hydra_blocks(ssm, attention, EXPERTS, workspace, facts), ssm, attention)
    return mqar_standard(LMConfig(d_model=64, pattern=ABLATIONS["all"], blocks=blocks))


def get_tiny() -> RunConfig:
    """Return a run with each part in a block of its own; the full laws also test parts in one block."""
    ssm = LongMamba(mixer=DiagonalSSM(max_timescale=8.0), training_length=24, context_length=48)
    experts = ChunkExperts(num_experts=3, top_k=2, intermediate_size=5, chunk_size=3)
    sparse = SparseGlobalAttention(window=3, top_k=2, block_size=2, num_heads=2, num_kv_heads=1, head_dim=6)
    mixers = {
        "experts": Parallel(ssm=ssm, experts=experts),
        "attention": Parallel(attention=sparse),
        "workspace": Workspace(num_slots=3, slot_dim=6, chunk_size=4),
        "facts": ProductKeys(num_sub_keys=4, num_heads=2, head_k_dim=6, value_dim=5, top_k=3),
    }
    blocks = {name: Block(mixer=mixer, channel=NoChannelMixer()) for name, mixer in mixers.items()}
    return mqar_standard_tiny(LMConfig(d_model=16, pattern="experts attention workspace facts", blocks=blocks))
