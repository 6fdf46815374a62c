"""Does staged training of Hydra's parts help?

`mqar_hydra_staged` has a curriculum and its control `mqar_hydra_at_once` trains all parts from the first step. Stages:
two learning rates with one seed, then the best on valid with a second seed.
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
