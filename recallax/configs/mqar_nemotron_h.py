"""A Nemotron-H stack on the standard mixture of MQAR.

Question: how much does it recall? Width 64; Mamba-2, perceptron, attention without positions, perceptron (Nemotron-H,
arXiv 2504.03624, section 2, which has one attention layer in about thirteen layers). Expected: no published result;
attention alone should solve the task. Cost: minutes on one H100.

    recallax train mqar_nemotron_h
    recallax train mqar_nemotron_h --model.pattern "(mamba mlp)*2"      the same depth without attention
"""

from recallax.configs.mqar_based import mqar_standard, mqar_standard_tiny
from recallax.layers import Attention, Mamba2, MixerConfig, NoChannelMixer, ReLUSquared
from recallax.models import Block, LMConfig
from recallax.train.run_config import RunConfig


def nemotron_h_model(d_model: int, mamba: Mamba2, attention: Attention) -> LMConfig:
    """Return a model of one period of the stack.

    Args:
        d_model: Width of the model.
        mamba: The recurrent mixer.
        attention: The attention.
    """
    parts: dict[str, MixerConfig] = {"mamba": mamba, "mlp": ReLUSquared(), "attention": attention}
    blocks = {name: Block(mixer=part, channel=NoChannelMixer()) for name, part in parts.items()}
    return LMConfig(d_model=d_model, pattern="mamba mlp attention mlp", blocks=blocks)


def get_config() -> RunConfig:
    return mqar_standard(nemotron_h_model(64, Mamba2(state_dim=64), Attention(rope_theta=None)))


def get_tiny() -> RunConfig:
    mamba = Mamba2(state_dim=6, head_dim=8, dt_limit=(0.01, 2.0))
    return mqar_standard_tiny(nemotron_h_model(16, mamba, Attention(num_heads=2, head_dim=6, rope_theta=None)))
