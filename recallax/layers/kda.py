"""Kimi Delta Attention: the delta rule with a decay per token and channel of the key.

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    bounded:  log alpha_t = lower_bound * sigmoid(exp(a) (x_t W_1 W_2 + b))
    softplus: log alpha_t = -exp(a) softplus(x_t W_1 W_2 + b)
    y_t = W_o [ rms_head(o_t) * sigmoid(x_t W_3 W_4) ]

with a per head, b per channel, low-rank projections of rank head_v_dim, and q, k = l2_normalize(silu(conv(x W))).

State: K V float32 per head and the last 3 inputs of the convolution.
Source: Kimi Linear (arXiv 2510.26692), section 4, which has the softplus gate; the later, larger models use the bounded
gate with a lower bound of -5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError, added_field
from recallax.layers.base import LayerInfo
from recallax.layers.delta_rule_cell import DeltaRuleCell
from recallax.layers.dense import Linear, LowRank, Projections, head_dim_of, parameter
from recallax.layers.memory import GatedMemoryConfig, HeadDims
from recallax.layers.output_projection import GateActivation
from recallax.layers.recurrence_gates import DecayGate, decay_rate, init_dt_bias, split_heads
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class KDA(GatedMemoryConfig):
    """Delta rule with a decay per token and channel (Kimi Delta Attention)."""

    gate_activation: ClassVar[GateActivation] = "sigmoid"

    num_heads: int = 4
    """Number of heads."""
    head_k_dim: int | None = None
    """Width of queries and keys per head; None: d_model / num_heads."""
    head_v_dim: int | None = None
    """Width of values per head; None: `head_k_dim`."""
    decay_gate: Literal["bounded", "softplus"] = "bounded"
    """Form of the decay gate: a sigmoid above `lower_bound`, or Mamba-2's softplus."""
    lower_bound: float = -5.0
    """Smallest log-decay of a token with the bounded gate; below 0."""
    allow_neg_eigval: bool = False
    """Double the beta gate to (0, 2), so that transitions may have negative eigenvalues (Grazzi et al. 2024)."""
    conv_size: int = 4
    """Taps of the short convolution; 0: no convolution."""
    norm_eps: float = 1e-5
    """Added to the mean square in the output norm."""
    output_gate_bias: bool = added_field(False)
    """Add a bias to the output gate, as flash-linear-attention does; the paper and its models have none."""

    def __post_init__(self) -> None:
        if self.lower_bound >= 0:
            raise ConfigError(f"lower_bound is {self.lower_bound}; the smallest log-decay of KDA must be below 0")

    def head_dims(self, d_model: int) -> HeadDims:
        head_k_dim = self.head_k_dim or head_dim_of("kda", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, head_k_dim, self.head_v_dim or head_k_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        _, num_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        widths = {"k": num_heads * head_k_dim, "v": num_heads * head_v_dim, "beta": num_heads}
        linear = {name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()}
        return Projections(
            linear | {"decay": LowRank(d_model, head_v_dim, num_heads * head_k_dim, precision=precision, rngs=rngs)}
        )

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "KDACell":
        _, num_heads, head_k_dim, head_v_dim = dims = self.head_dims(d_model)
        width = num_heads * (2 * head_k_dim + head_v_dim)
        conv = ShortConvolution(width, self.conv_size, precision=precision, rngs=rngs) if self.conv_size else None
        if self.decay_gate == "softplus":
            gate = DecayGate(num_heads, num_heads * head_k_dim, precision=precision, rngs=rngs)
        else:
            gate = BoundedDecayGate(num_heads, num_heads * head_k_dim, self.lower_bound, precision=precision, rngs=rngs)
        return KDACell(dims, conv, gate, self.allow_neg_eigval)

    def output_gate(self, d_model: int, width: int, *, precision: Precision, rngs: nnx.Rngs) -> LowRank:
        rank = self.head_dims(d_model).head_v_dim
        return LowRank(d_model, rank, width, precision=precision, rngs=rngs, bias=self.output_gate_bias)


class BoundedDecayGate(nnx.Module):
    """g = lower_bound * sigmoid(exp(a_log) (x + dt_bias)), a log-decay between `lower_bound` and 0."""

    def __init__(self, num_heads: int, channels: int, lower_bound: float, *, precision: Precision, rngs: nnx.Rngs):
        self.a_log = parameter(jnp.zeros(num_heads, precision.param), (None,), weight_decay=False)
        self.dt_bias = parameter(init_dt_bias(channels, precision, rngs), (None,), weight_decay=False)
        self.lower_bound = lower_bound

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T H K"]:
        """Compute the log-decay, float32, from projected tokens."""
        shifted = split_heads(x.astype(jnp.float32) + self.dt_bias[...][None, None], self.a_log.shape[0])
        return self.lower_bound * jax.nn.sigmoid(decay_rate(self.a_log[...])[None, None, :, None] * shifted)


class KDACell(DeltaRuleCell):
    """Matrix memory with the delta rule, and a decay per token and channel of the key."""

    def __init__(
        self,
        head_dims: HeadDims,
        conv: ShortConvolution | None,
        gate: BoundedDecayGate | DecayGate,
        allow_neg_eigval: bool,
    ):
        super().__init__(head_dims, conv, allow_neg_eigval)
        self.gate = gate

    def log_decay(self, projections: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "B T H K"]:
        decay = projections["decay"]
        if isinstance(self.gate, BoundedDecayGate):
            return self.gate(decay)
        return self.gate(split_heads(self.gate.dt(decay), self.head_dims.num_v_heads))
