"""DeltaNet: a matrix memory with the delta rule, which erases the value stored at a key before it writes a new one.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    q, k = l2_normalize(silu(conv(x W))),   v = silu(conv(x W_v)),   beta_t = sigmoid(x_t W_b) per head
    y_t = W_o rms_head(o_t)

State: K V float32 per head and the last 3 inputs of the convolution.
Source: Yang et al. 2024 (arXiv 2406.06484), sections 2.2 and 3.3; negative eigenvalues (beta up to 2): Grazzi et al.
2024 (arXiv 2411.12537).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from recallax.config import added_field
from recallax.layers.base import LayerInfo
from recallax.layers.delta_rule_cell import DeltaRuleCell
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.memory import HeadDims, MemoryConfig
from recallax.layers.output_projection import OutputProjection
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class DeltaNet(MemoryConfig):
    """Delta rule without a decay (DeltaNet)."""

    num_heads: int = 4
    """Number of heads."""
    head_k_dim: int | None = None
    """Width of queries and keys per head; None: d_model / num_heads."""
    head_v_dim: int | None = None
    """Width of values per head; None: `head_k_dim`."""
    allow_neg_eigval: bool = False
    """Double the beta gate to (0, 2), so that transitions may have negative eigenvalues (Grazzi et al. 2024)."""
    conv_size: int = 4
    """Taps of the short convolution; 0: no convolution."""
    norm_eps: float = added_field(1e-5)
    """Added to the mean square in the output norm."""

    def head_dims(self, d_model: int) -> HeadDims:
        head_k_dim = self.head_k_dim or head_dim_of("delta_net", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, head_k_dim, self.head_v_dim or head_k_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        _, num_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        widths = {"k": num_heads * head_k_dim, "v": num_heads * head_v_dim, "beta": num_heads}
        return Projections({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "DeltaNetCell":
        _, num_heads, head_k_dim, head_v_dim = dims = self.head_dims(d_model)
        width = num_heads * (2 * head_k_dim + head_v_dim)
        conv = ShortConvolution(width, self.conv_size, precision=precision, rngs=rngs) if self.conv_size else None
        return DeltaNetCell(dims, conv, self.allow_neg_eigval)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        _, num_heads, _, head_v_dim = self.head_dims(d_model)
        width = num_heads * head_v_dim
        return OutputProjection(
            width, d_model, layer, num_groups=num_heads, norm_eps=self.norm_eps, precision=precision, rngs=rngs
        )


class DeltaNetCell(DeltaRuleCell):
    """Matrix memory with the delta rule, without a decay."""

    def log_decay(self, projections: Mapping[str, Float[Array, "B T W"]]) -> None:
        return None
