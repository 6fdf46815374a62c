"""BASED-1.3B at its published size, on MQAR at the size of language-model pretraining.

Question: what does the model cost? 36 layers, width 1792, 1349.5M parameters; shape and optimizer settings of the
paper (arXiv 2402.18668). Expected: no published result on this task; tests check the counts of `recallax show`.
Cost: a day on one H100.

    recallax show based_1b3
"""

from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny, tiny_based_blocks
from recallax.models import LMConfig
from recallax.models.based_lm import based_1b3
from recallax.train.run_config import RunConfig


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(based_1b3())


def get_tiny() -> RunConfig:
    model = LMConfig(d_model=16, pattern="(conv based window)*2 conv", blocks=tiny_based_blocks(), remat="block")
    return mqar_at_pretraining_size_tiny(get_config(), model)
