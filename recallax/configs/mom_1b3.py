"""What does MoM of the paper's 1.3B setting cost, and does it train at MQAR of language-model size?

24 layers, published shape (arXiv 2502.13685). Expected: nothing published on this task
(on text: recall-intensive average 36.04 against 32.30 for Gated DeltaNet);
the counts of `recallax show` are tested. Cost: hours on one H100.

    recallax show mom_1b3
"""

from recallax.configs.based_360m import language_model_size, tiny_stack
from recallax.configs.mom_380m import tiny_blocks
from recallax.models import LMConfig
from recallax.models.mom import mom_1b3
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return language_model_size(mom_1b3())


def get_tiny() -> RunConfig:
    return tiny_stack(get_config(), LMConfig(d_model=16, pattern="mom*2", blocks=tiny_blocks()))
