"""Does load balancing change the use of experts?

On `mqar_micro`: a short convolution, then two layers of a state-space model in parallel with sparse attention and
experts for chunks of 8 tokens, either 4 experts with top 1 or 8 experts with top 2. They are trained with Switch's
balance loss, with a bias on the routing logits, and with neither. There are two seeds at the learning rate that was
best for attention in `hydra_parts`; accuracy is not compared.
"""

from dataclasses import replace

import jax

from recallax.configs import mqar_micro
from recallax.layers import ChunkExperts, DiagonalSSM, NoChannelMixer, Parallel, SparseGlobalAttention
from recallax.models import Block, LMConfig
from recallax.models.zoology_lm import CONV_BLOCK
from recallax.sweep import ResultRow, SweepStage, Trial
from recallax.train.program import Program
from recallax.train.run_config import AdamW, RunConfig
from recallax.train.step import TrainState

RATE, STEPS, SEEDS = 1e-2, 1500, (0, 1)
SIZES = {"4 experts, 1 chosen": (4, 1), "8 experts, 2 chosen": (8, 2)}
"""Number of experts and top k."""
BALANCES = {
    "neither": ChunkExperts(load_balance_loss_weight=0.0),
    "loss": ChunkExperts(load_balance_loss_weight=1e-2),
    "bias": ChunkExperts(load_balance_loss_weight=0.0, bias_update_rate=1e-3),
}


def all_trials(rows: list[ResultRow]) -> list[Trial]:
    """Return every number of experts, balance method and seed."""
    return [
        Trial(
            {"stage": "arms", "mixer": size, "balance": balance, "seed": seed},
            _run(size, balance, seed),
            expert_diagnostics,
        )
        for size in SIZES
        for balance in BALANCES
        for seed in SEEDS
    ]


def expert_diagnostics(program: Program, state: TrainState) -> ResultRow:
    """Measure the experts' diagnostics on one more training batch."""
    _, metrics = program.step(state, program.batch(STEPS))
    return {name: float(mean.total) for name, mean in jax.device_get(metrics.terms).items() if "expert" in name}


def _run(size: str, balance: str, seed: int) -> RunConfig:
    base = mqar_micro.get_config()
    num_experts, top_k = SIZES[size]
    mixer = replace(BALANCES[balance], num_experts=num_experts, top_k=top_k, intermediate_size=16, chunk_size=8)
    if top_k == 1:
        mixer = replace(mixer, norm_topk_prob=False)
    sparse = SparseGlobalAttention(window=8, top_k=8, block_size=4, rope_theta=None)
    paths = Parallel(ssm=DiagonalSSM(max_timescale=32.0), attention=sparse, experts=mixer)
    blocks = {"conv": CONV_BLOCK, "experts": Block(mixer=paths, channel=NoChannelMixer())}
    model = LMConfig(d_model=32, pattern="conv experts*2", blocks=blocks)
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    return replace(base, model=model, optim=AdamW(lr=RATE), train=train)


STAGES: tuple[SweepStage, ...] = (all_trials,)
