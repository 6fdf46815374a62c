"""Hydra at 1.6B parameters with a curriculum, on MQAR at the size of language-model pretraining.

Question: does staged training make the training more stable? `hydra_1b6` with the stages of `mqar_hydra_staged`, on
rows of 512, then 1024, then 2048 tokens; the control is `hydra_1b6`, which has as many steps. Expected: no published
result; the paper (arXiv 2508.15099) only states that training is staged. Cost: hours on one H100 or more.

    recallax show hydra_1b6_staged
    recallax train hydra_1b6_staged
"""

from dataclasses import replace

from recallax.configs import hydra_1b6
from recallax.configs.mqar_hydra_staged import StageSteps, hydra_stages, mqar_rows
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    control = hydra_1b6.get_config()
    vocab = control.task.vocab_size
    steps = StageSteps(ssm=(2000, 3000), attention=2000, experts=2000, workspace=2000, facts=2000)
    stages = hydra_stages(steps, short_task=mqar_rows(vocab, (512, 64)), medium_task=mqar_rows(vocab, (1024, 128)))
    return replace(control, curriculum=stages)


def get_tiny() -> RunConfig:
    control = hydra_1b6.get_tiny()
    steps = StageSteps(ssm=(1, 3), attention=2, experts=2, workspace=1, facts=2)
    stages = hydra_stages(steps, short_task=mqar_rows(32, (8, 1)), medium_task=mqar_rows(32, (12, 2)))
    return replace(control, train=replace(control.train, steps=12), curriculum=stages)
