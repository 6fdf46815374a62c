"""How much of MQAR's standard mixture does each part of Hydra recall, alone beside its state-space model and together?

Width 64; a window of 16 tokens and 32 chosen ones, 4 experts by chunks of 16, a workspace of 16 slots, 1,024 slots of
facts (Hydra, arXiv 2508.15099, at the size of MQAR). Expected: no published number; the state-space model has 64
states, so what is recalled is what attention and the workspace add. Cost: minutes on one H100.

    recallax train mqar_hydra
    recallax train mqar_hydra --model.pattern "ssm*4"                   the state-space model alone; with it:
    recallax train mqar_hydra --model.pattern "(ssm attention)*2"       or (ssm experts)*2, (ssm*2 workspace)*2
    recallax train mqar_hydra --model.pattern "(delta attention)*2"     another recurrence in its place
    recallax train mqar_hydra --model.pattern "(ssm asked)*2"           blocks ask for tokens; or keys, landmark
"""

from dataclasses import replace

from recallax.configs.mqar_based import standard, standard_tiny
from recallax.layers import (
    AskedTokens,
    ChunkExperts,
    DiagonalSSM,
    GatedDeltaNet,
    KeyScore,
    Landmark,
    LongMamba,
    Nothing,
    Parallel,
    ProductKeys,
    SparseGlobalAttention,
    Workspace,
)
from recallax.models import Block, LMConfig
from recallax.models.hydra import ABLATIONS, hydra_blocks
from recallax.train.run import RunConfig

EXPERTS = ChunkExperts(experts=4, inner=64, chunk=16)


def with_other_choices(
    blocks: dict[str, Block], ssm: DiagonalSSM, attention: SparseGlobalAttention
) -> dict[str, Block]:
    """The blocks, with other selectors, routes and recurrences."""
    others = {
        "asked": Parallel(ssm=ssm, attention=replace(attention, selector=AskedTokens(), cache="every token")),
        "keys": Parallel(ssm=ssm, attention=replace(attention, selector=KeyScore())),
        "landmark": Parallel(ssm=ssm, attention=Landmark(landmark_every=15, top_k=2)),
        "by_previous": Parallel(ssm=ssm, experts=replace(EXPERTS, route="previous chunk")),
        "by_token": Parallel(ssm=ssm, experts=replace(EXPERTS, route="token")),
        "long": Parallel(ssm=LongMamba(mixer=ssm, trained=256, context=1024)),
        "delta": Parallel(ssm=GatedDeltaNet(heads=1)),
    }
    return blocks | {name: Block(mixer=mixer, channel=Nothing()) for name, mixer in others.items()}


def get_config() -> RunConfig:
    ssm, attention = DiagonalSSM(longest=256.0), SparseGlobalAttention(window=16, chosen=32, block=16)
    workspace = Workspace(slots=16, rank=64, chunk=16)
    facts = ProductKeys(sub_keys=32, heads=2, key_dim=32, value_dim=64, top_k=8)
    blocks = with_other_choices(hydra_blocks(ssm, attention, EXPERTS, workspace, facts), ssm, attention)
    return standard(LMConfig(d_model=64, pattern=ABLATIONS["all"], blocks=blocks))


def get_tiny() -> RunConfig:
    """Every part once; that they also stand beside one another is among the laws' wide sweeps."""
    ssm = LongMamba(mixer=DiagonalSSM(longest=8.0), trained=24, context=48)
    experts = ChunkExperts(experts=3, top_k=2, inner=5, chunk=3)
    sparse = SparseGlobalAttention(window=3, chosen=2, block=2, heads=2, kv_heads=1, head_dim=6)
    mixers = {
        "experts": Parallel(ssm=ssm, experts=experts),
        "attention": Parallel(attention=sparse),
        "workspace": Workspace(slots=3, rank=6, chunk=4),
        "facts": ProductKeys(sub_keys=4, heads=2, key_dim=6, value_dim=5, top_k=3),
    }
    blocks = {name: Block(mixer=mixer, channel=Nothing()) for name, mixer in mixers.items()}
    return standard_tiny(LMConfig(d_model=16, pattern="experts attention workspace facts", blocks=blocks))
