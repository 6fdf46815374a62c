"""Hydra's curriculum beside its control, all parts from the first step: `mqar_hydra_staged` and `mqar_hydra_at_once`.

Stages: two learning rates; then a second seed at the rate that is best on valid. A run folder each, as curricula need
one: `recallax sweep`, not `python -m experiments`.
"""

from dataclasses import replace

from experiments.sweep_stages import lr_grid_then_seeds
from recallax.configs import mqar_hydra_at_once, mqar_hydra_staged
from recallax.sweep import SweepStage
from recallax.train.run_config import AdamW, RunConfig

RATES = (4e-3, 1e-2)
VARIANTS = {"in stages": mqar_hydra_staged.get_config, "all at once": mqar_hydra_at_once.get_config}


def _run(name: str, rate: float, seed: int) -> RunConfig:
    base = VARIANTS[name]()
    return replace(base, optim=AdamW(lr=rate), train=replace(base.train, seed=seed, data_seed=seed))


STAGES: tuple[SweepStage, ...] = lr_grid_then_seeds(VARIANTS, RATES, _run, other_seeds=(1,))
