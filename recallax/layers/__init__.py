"""Sequence and channel mixers, one file each: a config, a state and a module."""

from recallax.layers.attention import Attention
from recallax.layers.base import MixerConfig, RecurrentMixer, SequenceMixer, Site
from recallax.layers.base_conv import BaseConv
from recallax.layers.based import Based
from recallax.layers.gated_conv import GatedConv
from recallax.layers.identity import Identity
from recallax.layers.linear_attention import LinearAttention
from recallax.layers.sliding_window import SlidingWindow
from recallax.layers.swiglu import SwiGLU

__all__ = [
    "Attention",
    "BaseConv",
    "Based",
    "GatedConv",
    "Identity",
    "LinearAttention",
    "MixerConfig",
    "RecurrentMixer",
    "SequenceMixer",
    "Site",
    "SlidingWindow",
    "SwiGLU",
]
