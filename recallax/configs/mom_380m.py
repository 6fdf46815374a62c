"""What does MoM of the paper's 380M setting cost, and does it train at MQAR of language-model size?

24 layers, published shape (arXiv 2502.13685). Expected: nothing published on this task
(on text: recall-intensive average 28.16 against 24.78 for Gated DeltaNet);
the counts of `recallax show` are tested. Cost: hours on one H100.

    recallax show mom_380m
"""

from recallax.configs.based_360m import language_model_size, tiny_stack
from recallax.layers import Attention, GatedDeltaNet, MoM, SwiGLU
from recallax.models import Block, LMConfig
from recallax.models.mom import mom_380m, mom_hybrid
from recallax.train.run import RunConfig


def get_config() -> RunConfig:
    return language_model_size(mom_380m())


def get_tiny() -> RunConfig:
    memory = GatedDeltaNet(heads=2, key_dim=4, value_dim=4)
    mixer = MoM(memory=memory, num_memories=4, top_k=2)
    blocks = {"mom": Block(mixer=mixer, channel=SwiGLU(expand=2.0))}
    model = LMConfig(d_model=16, pattern="mom*4", blocks=blocks)
    return tiny_stack(get_config(), mom_hybrid(model, Block(mixer=Attention(heads=2)), ratio=1))
