"""Models: the stack of blocks, the language model around it, and published architectures as configs."""

from recallax.models.block import Block
from recallax.models.lm import LM, LMConfig
from recallax.models.readout import Autoencode, Tied, Untied

__all__ = ["LM", "Autoencode", "Block", "LMConfig", "Tied", "Untied"]
