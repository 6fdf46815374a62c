"""HGRN2: an outer-product memory whose key is what its forget gate lets go, with a floor that rises with depth.

    f_t = l + (1 - l) sigmoid(x_t W_f),   S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T silu(x_t W_q)
    y_t = W_o rms(o_t)   over the full width

The floors l are a cumulative softmax over the model's layers, 0 in the first, which the model owns and learns
(`recallax.models.hgrn2_lower_bounds`); a mixer alone keeps the value at which that softmax starts, i / n in layer i of n.
State: K V float32 per head.
Source: Qin et al. 2024 (HGRN2, arXiv 2404.07904), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added_field
from recallax.layers.base import LayerInfo, Statistic
from recallax.layers.dense import Linear, Projections
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import HeadDims, MemoryConfig
from recallax.layers.output_projection import OutputProjection
from recallax.layers.recurrence_gates import split_heads
from recallax.layers.state_reset import head_dim_of
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class HGRN2(MemoryConfig):
    """A gated outer-product memory with tied key and forget gate."""

    num_heads: int = 4
    """The published models take d_model / 128."""
    norm_eps: float = added_field(1e-5)
    """Of the output norm."""

    def head_dims(self, d_model: int) -> HeadDims:
        width = head_dim_of("hgrn2", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, width, width)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        return Projections({name: Linear(d_model, d_model, precision=precision, rngs=rngs) for name in ("decay", "v")})

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "HGRN2Cell":
        return HGRN2Cell(self.head_dims(d_model), layer)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        return OutputProjection(
            d_model, d_model, layer, num_groups=1, gate=None, norm_eps=self.norm_eps, precision=precision, rngs=rngs
        )


class HGRN2Cell(MatrixCell):
    """See the head of the file."""

    def __init__(self, head_dims: HeadDims, layer: LayerInfo):
        super().__init__(head_dims)
        start = jnp.asarray(layer.layer_idx, jnp.float32) / layer.num_layers
        self.floor = Statistic(jnp.broadcast_to(start, (head_dims.num_v_heads * head_dims.head_k_dim,)))

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        heads = self.head_dims.num_v_heads
        gate = split_heads(projections["decay"].astype(jnp.float32), heads)
        v = split_heads(projections["v"], heads)
        floor = jnp.broadcast_to(self.floor[...].reshape(heads, -1), gate.shape)
        # log f, without rounding f to 0 or 1 first
        keep = jnp.logaddexp(jnp.log(jnp.maximum(floor, 1e-37)), jnp.log1p(-floor) + jax.nn.log_sigmoid(gate))
        k = ((1 - floor) * jax.nn.sigmoid(-gate)).astype(v.dtype)
        return RecurrenceInputs(jax.nn.silu(split_heads(projections["q"], heads)), k, v, log_decay=jnp.minimum(keep, 0))
