"""Retention (RetNet): linear attention with a constant decay per head and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   gamma_h = 1 - 2^{-5-h}
    y_t = W_o [ rms_head(o_t) * silu(x_t W_g) ]

State: K V float32 per head, V = 2 K by default. Source: Sun et al. 2023 (RetNet, arXiv 2307.08621), equations 6 and 8,
with RMSNorm in place of GroupNorm, as in current implementations.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added_field
from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import GatedMemoryConfig, HeadDims
from recallax.layers.recurrence_gates import split_heads
from recallax.layers.rotary import check_rope_theta, rotary
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class RetNet(GatedMemoryConfig):
    """Linear attention with a constant decay per head (RetNet)."""

    num_heads: int = 8
    """Number of heads."""
    head_k_dim: int | None = None
    """Width of queries and keys per head, an even number; None: d_model / num_heads."""
    head_v_dim: int | None = None
    """Width of values per head; None: 2 * head_k_dim."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    norm_eps: float = added_field(1e-5)
    """Added to the mean square in the output norm."""

    def head_dims(self, d_model: int) -> HeadDims:
        head_k_dim = self.head_k_dim or head_dim_of("retnet", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, head_k_dim, self.head_v_dim or 2 * head_k_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        _, num_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        widths = {"k": num_heads * head_k_dim, "v": num_heads * head_v_dim}
        return Projections({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "RetNetCell":
        return RetNetCell(self.head_dims(d_model), self.rope_theta)


class RetNetCell(MatrixCell):
    """Matrix memory with rotary positions and a constant decay per head."""

    def __init__(self, head_dims: HeadDims, rope_theta: float):
        super().__init__(head_dims)
        check_rope_theta(rope_theta)
        self.rope_theta = rope_theta

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        num_heads, head_k_dim = self.head_dims.num_v_heads, self.head_dims.head_k_dim
        q, k = (rotary(split_heads(projections[name], num_heads), positions, self.rope_theta) for name in ("q", "k"))
        gamma = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(num_heads, dtype=jnp.float32))))
        return RecurrenceInputs(q * head_k_dim**-0.5, k, split_heads(projections["v"], num_heads), log_decay=gamma)
