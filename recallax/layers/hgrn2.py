"""HGRN2: an outer-product memory whose key is 1 - forget gate; the gate has a lower bound that rises with depth.

    f_t = l + (1 - l) sigmoid(x_t W_f),   S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T silu(x_t W_q)
    y_t = W_o rms(o_t)   over the full width

The lower bounds l are a cumulative softmax over the model's layers, 0 in the first layer. The language model owns and
trains them (`recallax.models.hgrn2_lower_bounds`). A mixer outside a model keeps their initial value, i / n in layer i
of n.
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
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import HeadDims, MemoryConfig
from recallax.layers.output_projection import OutputProjection
from recallax.layers.recurrence_gates import split_heads
from recallax.types import Precision

TINY = 1e-37
"""Least lower bound under the logarithm: near the smallest normal float32, so that a bound of 0 stays finite."""


@dataclass(frozen=True, kw_only=True)
class HGRN2(MemoryConfig):
    """Gated outer-product memory with tied key and forget gate (HGRN2)."""

    num_heads: int = 4
    """Number of heads; the published models have d_model / 128."""
    norm_eps: float = added_field(1e-5)
    """Added to the mean square in the output norm."""

    def head_dims(self, d_model: int) -> HeadDims:
        width = head_dim_of("hgrn2", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, width, width)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        return Projections({name: Linear(d_model, d_model, precision=precision, rngs=rngs) for name in ("decay", "v")})

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "HGRN2Cell":
        return HGRN2Cell(self.head_dims(d_model), layer)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        return OutputProjection(
            d_model, d_model, layer, num_groups=1, norm_eps=self.norm_eps, precision=precision, rngs=rngs
        )


class HGRN2Cell(MatrixCell):
    """Matrix memory with a decay per token and channel, and the key 1 - decay."""

    def __init__(self, head_dims: HeadDims, layer: LayerInfo):
        super().__init__(head_dims)
        start = jnp.asarray(layer.layer_idx, jnp.float32) / layer.num_layers
        self.floor = Statistic(jnp.broadcast_to(start, (head_dims.num_v_heads * head_dims.head_k_dim,)))

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        num_heads = self.head_dims.num_v_heads
        gate = split_heads(projections["decay"].astype(jnp.float32), num_heads)
        v = split_heads(projections["v"], num_heads)
        bound = jnp.broadcast_to(self.floor[...].reshape(num_heads, -1), gate.shape)
        # log f = log(l + (1 - l) sigmoid(gate)), in a form that does not round f to 0 or 1 first.
        log_bound = jnp.log(jnp.maximum(bound, TINY))
        log_decay = jnp.minimum(jnp.logaddexp(log_bound, jnp.log1p(-bound) + jax.nn.log_sigmoid(gate)), 0)
        k = ((1 - bound) * jax.nn.sigmoid(-gate)).astype(v.dtype)
        return RecurrenceInputs(jax.nn.silu(split_heads(projections["q"], num_heads)), k, v, log_decay=log_decay)
