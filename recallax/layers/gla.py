"""Gated linear attention (GLA): a decay per token and channel of the key, from a low-rank projection.

    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   alpha_t = sigmoid(x_t W_1 W_2 + b)^{1/16}
    y_t = W_o [ rms_head(o_t) * silu(x_t W_g) ]

State: K V float32 per head; by default there are 4 heads, all keys together are d / 2 wide and all values d.
Source: Yang et al. 2023 (GLA, arXiv 2312.06635), section 4.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added_field
from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, LowRank, Projections, head_dim_of
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import GatedMemoryConfig, HeadDims
from recallax.layers.recurrence_gates import split_heads
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class GLA(GatedMemoryConfig):
    """Gated linear attention (GLA)."""

    num_heads: int = 4
    """Number of heads."""
    head_k_dim: int | None = None
    """Width of queries and keys per head; None: d_model / num_heads / 2."""
    head_v_dim: int | None = None
    """Width of values per head; None: d_model / num_heads."""
    gate_low_rank_dim: int = 16
    """Rank of the projection of the decay gate."""
    gate_logit_normalizer: float = 16.0
    """The decay is the sigmoid to the power 1 / this; larger values decay more slowly."""
    conv_size: int = 0
    """Taps of the short convolution on queries, keys and values; 0: no convolution, as published."""
    norm_eps: float = added_field(1e-5)
    """Added to the mean square in the output norm."""

    def head_dims(self, d_model: int) -> HeadDims:
        head_v_dim = self.head_v_dim or head_dim_of("gla", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, self.head_k_dim or max(1, head_v_dim // 2), head_v_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        _, num_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        return Projections(
            {
                "k": Linear(d_model, num_heads * head_k_dim, precision=precision, rngs=rngs),
                "v": Linear(d_model, num_heads * head_v_dim, precision=precision, rngs=rngs),
                "decay": LowRank(
                    d_model, self.gate_low_rank_dim, num_heads * head_k_dim, precision=precision, rngs=rngs, bias=True
                ),
            }
        )

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "GLACell":
        _, num_heads, head_k_dim, head_v_dim = dims = self.head_dims(d_model)
        width = num_heads * (2 * head_k_dim + head_v_dim)
        conv = ShortConvolution(width, self.conv_size, precision=precision, rngs=rngs) if self.conv_size else None
        return GLACell(dims, conv, self.gate_logit_normalizer)


class GLACell(MatrixCell):
    """Matrix memory with a decay per token and channel of the key."""

    def __init__(self, head_dims: HeadDims, conv: ShortConvolution | None, gate_logit_normalizer: float):
        super().__init__(head_dims, conv)
        self.gate_logit_normalizer = gate_logit_normalizer

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        q, k, v, decay = (
            split_heads(projections[name], self.head_dims.num_v_heads) for name in ("q", "k", "v", "decay")
        )
        log_decay = jax.nn.log_sigmoid(decay.astype(jnp.float32)) / self.gate_logit_normalizer
        return RecurrenceInputs(q * self.head_dims.head_k_dim**-0.5, k, v, log_decay=log_decay)
