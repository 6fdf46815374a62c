"""What each part of Hydra buys on `mqar_micro`, beside two state-space blocks of 32 states each.

Stages: two learning rates for every arm; then a second seed at the rate that is best on valid.
"""

from dataclasses import replace

from experiments.cell import Stage, rates_then_seeds
from recallax.configs import mqar_micro
from recallax.layers import (
    AskedTokens,
    ChunkExperts,
    DiagonalSSM,
    KeyScore,
    Landmark,
    MixerConfig,
    Nothing,
    Parallel,
    ProductKeys,
    SlidingWindow,
    SparseGlobalAttention,
    Workspace,
)
from recallax.models import Block, LMConfig
from recallax.models.hydra import hydra_blocks
from recallax.train.run import AdamW, RunConfig

RATES = (4e-3, 1e-2)
STEPS = 1500
SSM, SPARSE = DiagonalSSM(longest=32.0), SparseGlobalAttention(window=8, chosen=8, block=4)
ATTENTION: dict[str, MixerConfig] = {
    "window": SlidingWindow(window=8),
    "wider": SlidingWindow(window=16),
    "asked": replace(SPARSE, selector=AskedTokens(width=16), cache="every token"),
    "keys": replace(SPARSE, selector=KeyScore(hidden=32)),
    "landmark": Landmark(landmark_every=7),
}
BLOCKS = hydra_blocks(
    SSM,
    SPARSE,
    ChunkExperts(experts=4, inner=32, chunk=8),
    Workspace(slots=16, rank=32, chunk=8),
    ProductKeys(sub_keys=16, heads=2, key_dim=16, value_dim=32, top_k=4),
) | {name: Block(mixer=Parallel(ssm=SSM, attention=part), channel=Nothing()) for name, part in ATTENTION.items()}
PATTERNS = {
    "state-space model alone": "ssm*2",
    "three blocks of it": "ssm*3",
    "+ window of 8": "ssm window",
    "+ window of 16": "ssm wider",
    "+ window of 8 and 8 chosen by score": "ssm attention",
    "+ window of 8 and 8 asked for": "ssm asked",
    "+ window of 8 and 8 by key selection": "ssm keys",
    "+ landmark blocks of 8": "ssm landmark",
    "+ experts": "ssm experts",
    "+ workspace": "ssm workspace ssm",
    "+ product keys": "ssm facts ssm",
    "all parts": "ssm workspace facts all",
}


def _run(name: str, rate: float, seed: int) -> RunConfig:
    base = mqar_micro.get_config()
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    model = LMConfig(d_model=32, pattern=PATTERNS[name], blocks=BLOCKS)
    return replace(base, model=model, optim=AdamW(lr=rate), train=train)


STAGES: tuple[Stage, ...] = rates_then_seeds(PATTERNS, RATES, _run, others=(1,))
