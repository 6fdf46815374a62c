"""MoM at the 380M setting of the paper, on MQAR at the size of language-model pretraining.

Question: what does the model cost, and does it train? 24 layers, shape of the paper (arXiv 2502.13685). Expected: no
published result on this task (on text: recall-intensive average 28.16, and 24.78 for Gated DeltaNet); tests check the
counts of `recallax show`. Cost: hours on one H100.

    recallax show mom_380m
"""

from recallax.configs import mqar_mom
from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny
from recallax.layers import Attention, SwiGLU
from recallax.models import Block, LMConfig
from recallax.models.mom_lm import mom_380m, mom_hybrid
from recallax.train.run_config import RunConfig


def tiny_mom_blocks() -> dict[str, Block]:
    """Return a block with the mixer of `mqar_mom.get_tiny`, so that the laws test it once."""
    mixer = mqar_mom.get_tiny().model.blocks["mixer"].mixer
    return {"mom": Block(mixer=mixer, channel=SwiGLU(expand=2.0))}


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(mom_380m())


def get_tiny() -> RunConfig:
    model = LMConfig(d_model=16, pattern="mom*4", blocks=tiny_mom_blocks())
    return mqar_at_pretraining_size_tiny(get_config(), mom_hybrid(model, Block(mixer=Attention(num_heads=2)), ratio=1))
