"""A small hybrid for tasks beyond MQAR: a gated convolution and the mixer under test, twice, with SwiGLU."""

from recallax.layers import GatedConv, MixerConfig, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.models.lm_head import LMHead, Tied


def hybrid(mixer: MixerConfig, d_model: int, lm_head: LMHead | None = None) -> LMConfig:
    """`(conv mixer)*2` at the given width."""
    blocks = {
        "conv": Block(mixer=GatedConv(conv_size=3), channel=SwiGLU()),
        "mixer": Block(mixer=mixer, channel=SwiGLU()),
    }
    return LMConfig(d_model=d_model, pattern="(conv mixer)*2", blocks=blocks, lm_head=lm_head or Tied())
