"""A small hybrid for tasks beyond MQAR: a gated convolution and the mixer under test, twice, with SwiGLU."""

from recallax.layers import GatedConv, MixerConfig, SwiGLU
from recallax.models.block import Block
from recallax.models.lm import LMConfig
from recallax.models.readout import Readout, Tied


def hybrid(mixer: MixerConfig, d_model: int, readout: Readout | None = None) -> LMConfig:
    """`(conv mixer)*2` at the given width."""
    blocks = {
        "conv": Block(mixer=GatedConv(width=3), channel=SwiGLU()),
        "mixer": Block(mixer=mixer, channel=SwiGLU()),
    }
    return LMConfig(d_model=d_model, pattern="(conv mixer)*2", blocks=blocks, readout=readout or Tied())
