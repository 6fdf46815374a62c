"""Hydra at 1.6B parameters, on MQAR at the size of language-model pretraining.

Question: what does the model cost, and does it train? 24 blocks of width 2048. The paper (arXiv 2508.15099) gives the
total number of parameters; `recallax/models/hydra_lm.py` describes how they are divided. Expected: 1.62B parameters, of
which 0.94B are used per token, a state of 51 MB at any context, and FLOPs per token that do not grow with the context.
Cost: hours on one H100 or more.

    recallax show hydra_1b6
    recallax show hydra_1b6 --model.pattern "(ssm experts)*12"           without attention
"""

from recallax.configs import mqar_hydra
from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny
from recallax.models.hydra_lm import hydra_1b6
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(hydra_1b6())


def get_tiny() -> RunConfig:
    return mqar_at_pretraining_size_tiny(get_config(), mqar_hydra.get_tiny().model)
