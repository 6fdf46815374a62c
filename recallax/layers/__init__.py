"""Sequence and channel mixers, one file each: a config, a state and a module."""

from recallax.layers.attention import Attention
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, SequenceMixer
from recallax.layers.base_conv import BaseConv
from recallax.layers.based import Based
from recallax.layers.chunk_experts import ChunkExperts
from recallax.layers.delta_net import DeltaNet
from recallax.layers.diagonal_ssm import DiagonalSSM
from recallax.layers.gated_conv import GatedConv
from recallax.layers.gated_delta_net import GatedDeltaNet
from recallax.layers.gated_delta_product import GatedDeltaProduct
from recallax.layers.gla import GLA
from recallax.layers.hgrn2 import HGRN2
from recallax.layers.identity import Identity
from recallax.layers.kda import KDA
from recallax.layers.landmark import Landmark
from recallax.layers.linear_attention import LinearAttention
from recallax.layers.long_mamba import LongMamba
from recallax.layers.mamba import Mamba
from recallax.layers.mamba2 import Mamba2
from recallax.layers.memory import MemoryConfig
from recallax.layers.memory_as_context import MemoryAsContext
from recallax.layers.memory_as_gate import MemoryAsGate
from recallax.layers.mom import MoM
from recallax.layers.neural_memory import NeuralMemory
from recallax.layers.no_channel_mixer import NoChannelMixer
from recallax.layers.parallel import Parallel
from recallax.layers.prefix_linear import PrefixLinear
from recallax.layers.product_keys import ProductKeys
from recallax.layers.relu_squared import ReLUSquared
from recallax.layers.retnet import RetNet
from recallax.layers.rg_lru import RGLRU
from recallax.layers.selection import KeyScore, QueryDependentSelector, TokenScore
from recallax.layers.sliding_window import SlidingWindow
from recallax.layers.sparse_global_attention import SparseGlobalAttention
from recallax.layers.swiglu import SwiGLU
from recallax.layers.workspace import Workspace

__all__ = [
    "GLA",
    "HGRN2",
    "KDA",
    "RGLRU",
    "Attention",
    "BaseConv",
    "Based",
    "ChunkExperts",
    "DeltaNet",
    "DiagonalSSM",
    "GatedConv",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "Identity",
    "KeyScore",
    "Landmark",
    "LayerInfo",
    "LinearAttention",
    "LongMamba",
    "Mamba",
    "Mamba2",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryConfig",
    "MixerConfig",
    "MoM",
    "NeuralMemory",
    "NoChannelMixer",
    "Parallel",
    "PrefixLinear",
    "ProductKeys",
    "QueryDependentSelector",
    "ReLUSquared",
    "RecurrentMixer",
    "RetNet",
    "SequenceMixer",
    "SlidingWindow",
    "SparseGlobalAttention",
    "SwiGLU",
    "TokenScore",
    "Workspace",
]
