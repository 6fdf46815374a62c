"""What does BASED-1.3B cost?

36 layers, width 1792, 1349.5M parameters; the published shape (arXiv 2402.18668) and optimizer settings. Expected:
nothing published on this task; the counts of `recallax show` are tested. Cost: a day on one H100.

    recallax show based_1b3
"""

from recallax.configs.based_360m import language_model_size, tiny_blocks, tiny_stack
from recallax.models import LMConfig
from recallax.models.based import based_1b3
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return language_model_size(based_1b3())


def get_tiny() -> RunConfig:
    model = LMConfig(d_model=16, pattern="(conv based window)*2 conv", blocks=tiny_blocks(), remat="block")
    return tiny_stack(get_config(), model)
