"""Sequence mixers and channel mixers, one file each: a config, a state and a module.

Configs, base classes, states and the parts that new mixers are built from can be imported from here.
"""

from recallax.layers.attention import Attention
from recallax.layers.base import LayerInfo, MixerConfig, QueryableMixer, RecurrentMixer, SequenceMixer, State, Statistic
from recallax.layers.base_conv import BaseConv, BaseConvState
from recallax.layers.based import Based
from recallax.layers.chunk_experts import ChunkExperts, ChunkExpertsState
from recallax.layers.delta_net import DeltaNet
from recallax.layers.delta_rule_cell import DeltaRuleCell
from recallax.layers.dense import Linear, LowRank, Projections, parameter
from recallax.layers.diagonal_ssm import DiagonalSSM, DiagonalSSMState
from recallax.layers.gated_conv import GatedConv, GatedConvState
from recallax.layers.gated_delta_net import GatedDeltaNet
from recallax.layers.gated_delta_product import GatedDeltaProduct
from recallax.layers.gla import GLA
from recallax.layers.hgrn2 import HGRN2
from recallax.layers.identity import Identity
from recallax.layers.kda import KDA
from recallax.layers.landmark import Landmark, LandmarkState
from recallax.layers.linear_attention import LinearAttention
from recallax.layers.long_mamba import LongMamba
from recallax.layers.mamba import Mamba, MambaState
from recallax.layers.mamba2 import Mamba2
from recallax.layers.matrix_memory import MatrixCell, MatrixState, RecurrenceInputs
from recallax.layers.memory import GatedMemoryConfig, HeadDims, MemoryConfig, MemoryMixer, RecurrentCell
from recallax.layers.memory_as_context import MemoryAsContext, MemoryAsContextState
from recallax.layers.memory_as_gate import MemoryAsGate, MemoryAsGateState
from recallax.layers.mom import MoM
from recallax.layers.neural_memory import NeuralMemory, NeuralMemoryState
from recallax.layers.no_channel_mixer import NoChannelMixer
from recallax.layers.norm import RMSNorm
from recallax.layers.output_projection import OutputProjection
from recallax.layers.parallel import Parallel
from recallax.layers.prefix_linear import PrefixLinear
from recallax.layers.product_keys import ProductKeys
from recallax.layers.relu_squared import ReLUSquared
from recallax.layers.retnet import RetNet
from recallax.layers.rg_lru import RGLRU, RGLRUState
from recallax.layers.selection import (
    KeyScore,
    QueryDependentSelector,
    SelectionScores,
    Selector,
    SelectorConfig,
    SelectorInputs,
    TokenScore,
)
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.sliding_window import SlidingWindow
from recallax.layers.softmax_attention import SoftmaxAttentionConfig
from recallax.layers.sparse_global_attention import SparseGlobalAttention, SparseGlobalState
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.layers.stateless import StatelessMixer
from recallax.layers.swiglu import SwiGLU
from recallax.layers.workspace import Workspace, WorkspaceState
from recallax.pallas_kernels.neural_memory import InnerOptimizer
from recallax.pallas_kernels.neural_memory.inner_optimizer import LinearNet, MLPNet, RandomFeatureNet, SwiGLUNet
from recallax.pallas_kernels.taylor_attention import TaylorState
from recallax.pallas_kernels.window_attention import KVCache

__all__ = [
    "GLA",
    "HGRN2",
    "KDA",
    "RGLRU",
    "Attention",
    "BaseConv",
    "BaseConvState",
    "Based",
    "ChunkExperts",
    "ChunkExpertsState",
    "DeltaNet",
    "DeltaRuleCell",
    "DiagonalSSM",
    "DiagonalSSMState",
    "GatedConv",
    "GatedConvState",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "GatedMemoryConfig",
    "HeadDims",
    "Identity",
    "InnerOptimizer",
    "KVCache",
    "KeyScore",
    "Landmark",
    "LandmarkState",
    "LayerInfo",
    "Linear",
    "LinearAttention",
    "LinearNet",
    "LongMamba",
    "LowRank",
    "MLPNet",
    "Mamba",
    "Mamba2",
    "MambaState",
    "MatrixCell",
    "MatrixState",
    "MemoryAsContext",
    "MemoryAsContextState",
    "MemoryAsGate",
    "MemoryAsGateState",
    "MemoryConfig",
    "MemoryMixer",
    "MixerConfig",
    "MoM",
    "NeuralMemory",
    "NeuralMemoryState",
    "NoChannelMixer",
    "OutputProjection",
    "Parallel",
    "PrefixLinear",
    "ProductKeys",
    "Projections",
    "QueryDependentSelector",
    "QueryableMixer",
    "RGLRUState",
    "RMSNorm",
    "RandomFeatureNet",
    "ReLUSquared",
    "RecurrenceInputs",
    "RecurrentCell",
    "RecurrentMixer",
    "RetNet",
    "SelectionScores",
    "Selector",
    "SelectorConfig",
    "SelectorInputs",
    "SequenceMixer",
    "ShortConvolution",
    "SlidingWindow",
    "SoftmaxAttentionConfig",
    "SparseGlobalAttention",
    "SparseGlobalState",
    "State",
    "StatelessMixer",
    "Statistic",
    "SwiGLU",
    "SwiGLUNet",
    "TaylorState",
    "TokenScore",
    "Workspace",
    "WorkspaceState",
    "parameter",
    "reset_for_prefill",
    "reset_for_step",
]
