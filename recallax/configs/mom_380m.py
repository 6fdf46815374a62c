"""What does MoM of the paper's 380M setting cost, and does it train at MQAR of language-model size?

24 layers, published shape (arXiv 2502.13685). Expected: nothing published on this task
(on text: recall-intensive average 28.16 against 24.78 for Gated DeltaNet);
the counts of `recallax show` are tested. Cost: hours on one H100.

    recallax show mom_380m
"""

from recallax.configs import mqar_mom
from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny
from recallax.layers import Attention, SwiGLU
from recallax.models import Block, LMConfig
from recallax.models.mom_lm import mom_380m, mom_hybrid
from recallax.train.run_config import RunConfig


def tiny_mom_blocks() -> dict[str, Block]:
    """The mixer of `mqar_mom`'s small form, so that the laws meet it once."""
    mixer = mqar_mom.get_tiny().model.blocks["mixer"].mixer
    return {"mom": Block(mixer=mixer, channel=SwiGLU(expand=2.0))}


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(mom_380m())


def get_tiny() -> RunConfig:
    model = LMConfig(d_model=16, pattern="mom*4", blocks=tiny_mom_blocks())
    return mqar_at_pretraining_size_tiny(get_config(), mom_hybrid(model, Block(mixer=Attention(num_heads=2)), ratio=1))
