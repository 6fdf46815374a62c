"""What do Hydra's parts recall when all of them train from the first step?

The control of `mqar_hydra_staged`: the same model, rows, rate and number of steps, without stages. Expected: no
published number; the state-space models alone guess (.19). Cost: some three minutes on a CPU core.

    recallax train mqar_hydra_at_once
"""

from recallax.configs.mqar_hydra_staged import joint_training_run, joint_training_run_tiny
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return joint_training_run()


def get_tiny() -> RunConfig:
    return joint_training_run_tiny()
