"""Models: the stack of blocks, the language model around it, and published architectures as configs."""

from recallax.models.block import Block
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import Autoencoder, Tied, Untied

__all__ = ["LM", "Autoencoder", "Block", "LMConfig", "Tied", "Untied"]
