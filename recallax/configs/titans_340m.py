"""Titans with memory as a gate at 340M parameters, on MQAR at the size of language-model pretraining.

Question: what does the model cost, and does it train? 24 layers, width and heads of the paper (arXiv 2501.00663,
NeurIPS version). Expected: no published result on this task (on text: LAMBADA perplexity 28.72, and 30.94 for Gated
DeltaNet). Cost: hours on one H100.

    recallax show titans_340m
    recallax train titans_340m --model.pattern "mac*24"                  memory as a context
    recallax train titans_340m --model.pattern "(memory window)*24"      memory as a layer
    recallax train titans_340m --model.pattern "lmm*24"                  the memory alone
"""

from dataclasses import replace

from recallax.configs import mqar_neural_memory
from recallax.configs.based_360m import mqar_at_pretraining_size, mqar_at_pretraining_size_tiny
from recallax.layers import SlidingWindow, SwiGLU
from recallax.models import LMConfig
from recallax.models.titans_lm import titans, titans_blocks
from recallax.train.run_config import RunConfig


def add_titans_variants(config: LMConfig) -> LMConfig:
    """Return the model with additional blocks for the other combinations of memory and attention."""
    others = {name: block for join in ("mac", "mal", "lmm") for name, block in titans("340m", join).blocks.items()}
    return replace(config, blocks=others | config.blocks)


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(add_titans_variants(titans("340m", "mag")))


def get_tiny() -> RunConfig:
    memory = mqar_neural_memory.get_tiny().model.blocks["mixer"].mixer
    window = SlidingWindow(window=5, num_heads=2, num_persistent_tokens=3)
    blocks, pattern = titans_blocks("mag", memory, window, SwiGLU(expand=2.0), 1)
    more, layers = titans_blocks("mal", memory, window, SwiGLU(expand=2.0), 1)
    model = LMConfig(d_model=16, pattern=f"{pattern} {layers}", blocks=blocks | more)
    return mqar_at_pretraining_size_tiny(get_config(), model)
