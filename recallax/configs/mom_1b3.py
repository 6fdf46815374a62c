"""MoM at the 1.3B setting of the paper, on MQAR at the size of language-model pretraining.

Question: what does the model cost, and does it train? 24 layers, shape of the paper (arXiv 2502.13685). Expected: no
published result on this task (on text: recall-intensive average 36.04, and 32.30 for Gated DeltaNet); tests check the
counts of `recallax show`. Cost: hours on one H100.

    recallax show mom_1b3
"""

from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny
from recallax.configs.mom_380m import tiny_mom_blocks
from recallax.models import LMConfig
from recallax.models.mom_lm import mom_1b3
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(mom_1b3())


def get_tiny() -> RunConfig:
    return mqar_at_pretraining_size_tiny(get_config(), LMConfig(d_model=16, pattern="mom*2", blocks=tiny_mom_blocks()))
