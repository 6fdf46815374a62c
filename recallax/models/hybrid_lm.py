"""A small hybrid for tasks other than MQAR: a gated convolution and the mixer under test, twice, with SwiGLU."""

from recallax.layers import GatedConv, MixerConfig, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.models.lm_head import LMHead, Tied


def hybrid(mixer: MixerConfig, d_model: int, lm_head: LMHead | None = None) -> LMConfig:
    """Return the model `(conv mixer)*2`.

    Args:
        mixer: The mixer under test.
        d_model: The model's width.
        lm_head: The language model head. None: tied.

    Returns:
        The model config.
    """
    blocks = {
        "conv": Block(mixer=GatedConv(conv_size=3), channel=SwiGLU()),
        "mixer": Block(mixer=mixer, channel=SwiGLU()),
    }
    return LMConfig(d_model=d_model, pattern="(conv mixer)*2", blocks=blocks, lm_head=lm_head or Tied())
