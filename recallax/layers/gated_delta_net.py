"""Gated DeltaNet: the delta rule with a decay per token and value head; value heads may share queries and keys.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    alpha_t = exp(-exp(a) softplus(x_t W_a + b)),   beta_t = sigmoid(x_t W_b),   q, k = l2_normalize(silu(conv(x W)))
    y_t = W_o [ rms_head(o_t) * silu(x_t W_g) ]

State: K V float32 per value head and the last 3 inputs of the convolution.
Source: Yang et al. 2024 (arXiv 2412.06464), equation 10 and section 3.4; grouped value heads as in Qwen3-Next.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo
from recallax.layers.delta_rule_cell import DeltaRuleCell
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.memory import GatedMemoryConfig, HeadDims
from recallax.layers.recurrence_gates import DecayGate
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(GatedMemoryConfig):
    """Delta rule with a decay per token and head (Gated DeltaNet)."""

    num_heads: int = 4
    """Heads of queries and keys."""
    num_v_heads: int | None = None
    """Heads of values, a multiple of `num_heads`; None: `num_heads`."""
    head_k_dim: int | None = None
    """Width of queries and keys per head; None: 3/4 of d_model / num_heads, as published."""
    head_v_dim: int | None = None
    """Width of values per value head; None: 2 * head_k_dim."""
    allow_neg_eigval: bool = False
    """Double the beta gate to (0, 2), so that transitions may have negative eigenvalues (Grazzi et al. 2024)."""
    conv_size: int = 4
    """Taps of the short convolution; 0: no convolution."""
    norm_eps: float = 1e-5
    """Added to the mean square in the output norm."""

    def head_dims(self, d_model: int) -> HeadDims:
        num_v_heads = self.num_v_heads or self.num_heads
        head_dim_of("gated_delta_net's value heads over key heads", num_v_heads, self.num_heads)
        head_k_dim = self.head_k_dim or max(1, 3 * head_dim_of("gated_delta_net", d_model, self.num_heads) // 4)
        return HeadDims(self.num_heads, num_v_heads, head_k_dim, self.head_v_dim or 2 * head_k_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        num_heads, num_v_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        widths = {"k": num_heads * head_k_dim, "v": num_v_heads * head_v_dim, "beta": num_v_heads, "decay": num_v_heads}
        return Projections({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "GatedDeltaNetCell":
        num_heads, num_v_heads, head_k_dim, head_v_dim = dims = self.head_dims(d_model)
        width = 2 * num_heads * head_k_dim + num_v_heads * head_v_dim
        conv = ShortConvolution(width, self.conv_size, precision=precision, rngs=rngs) if self.conv_size else None
        gate = DecayGate(num_v_heads, num_v_heads, precision=precision, rngs=rngs)
        return GatedDeltaNetCell(dims, conv, gate, self.allow_neg_eigval)


class GatedDeltaNetCell(DeltaRuleCell):
    """Matrix memory with the delta rule, and a decay per token and value head."""

    def __init__(self, head_dims: HeadDims, conv: ShortConvolution | None, gate: DecayGate, allow_neg_eigval: bool):
        super().__init__(head_dims, conv, allow_neg_eigval)
        self.gate = gate

    def log_decay(self, projections: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "B T H"]:
        return self.gate(self.gate.dt(projections["decay"]))
