"""Hydra on a small MQAR, with all parameters trained from the first step.

Question: how much do Hydra's parts recall without stages? The control of `mqar_hydra_staged`: the same model, rows,
learning rate and number of steps. Expected: no published result; the state-space models alone reach chance (0.19).
Cost: about three minutes on one CPU core.

    recallax train mqar_hydra_at_once
"""

from recallax.configs.mqar_hydra_staged import joint_training_run, joint_training_run_tiny
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return joint_training_run()


def get_tiny() -> RunConfig:
    return joint_training_run_tiny()
