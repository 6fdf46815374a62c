"""What a balance loss, or a bias in the choice, does to how experts are used.

Two blocks on `mqar_micro`: a state-space model beside experts by chunks of 8, 4 of them with 1 chosen and 8 with 2,
under Switch's loss, under a bias that moves, and under neither; two seeds at one rate, for accuracy is not asked.
"""

from dataclasses import replace

import jax

from experiments.cell import Cell, Row, Stage
from recallax.configs import mqar_micro
from recallax.layers import ChunkExperts, DiagonalSSM, Nothing, Parallel
from recallax.models import Block, LMConfig
from recallax.train.program import Program
from recallax.train.run import AdamW, RunConfig
from recallax.train.step import TrainState

RATE, STEPS, SEEDS = 4e-3, 1500, (0, 1)
SIZES = {"4 experts, 1 chosen": (4, 1), "8 experts, 2 chosen": (8, 2)}
BALANCES = {
    "neither": ChunkExperts(balance_weight=0.0),
    "loss": ChunkExperts(balance_weight=1e-2),
    "bias": ChunkExperts(balance_weight=0.0, bias_rate=1e-3),
}


def arms(rows: list[Row]) -> list[Cell]:
    return [
        Cell({"stage": "arms", "mixer": size, "balance": balance, "seed": seed}, _run(size, balance, seed), used)
        for size in SIZES
        for balance in BALANCES
        for seed in SEEDS
    ]


def used(program: Program, state: TrainState) -> Row:
    """The diagnostics of one more training batch."""
    _, report = program.step(state, program.batch(STEPS))
    return {name: float(mean.total) for name, mean in jax.device_get(report.terms).items() if "expert" in name}


def _run(size: str, balance: str, seed: int) -> RunConfig:
    base = mqar_micro.get_config()
    experts, chosen = SIZES[size]
    mixer = replace(BALANCES[balance], experts=experts, top_k=chosen, inner=32, chunk=8)
    if chosen == 1:
        mixer = replace(mixer, weights="softmax")
    block = Block(mixer=Parallel(ssm=DiagonalSSM(longest=32.0), experts=mixer), channel=Nothing())
    model = LMConfig(d_model=32, pattern="experts*2", blocks={"experts": block})
    train = replace(base.train, steps=STEPS, seed=seed, data_seed=seed)
    return replace(base, model=model, optim=AdamW(lr=RATE), train=train)


STAGES: tuple[Stage, ...] = (arms,)
