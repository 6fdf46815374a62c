"""Linear attention with a choice of feature map.

    y_t = phi(q_t) S_t / (phi(q_t) z_t + eps),   S_t = sum_{j<=t} phi(k_j) v_j^T,   z_t = sum_{j<=t} phi(k_j)

With the identity map the denominator may vanish, so there y_t = RMSNorm(q_t S_t) per head (Qin et al. 2022, arXiv
2210.10340). There are no rotary positions, as in BASED.

State: F (V + 1) float32 per head, where F is the width of the feature map; F V with the identity map.
Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 16 to 20.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added_field
from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import HeadDims, MemoryConfig
from recallax.layers.output_projection import OutputProjection
from recallax.layers.recurrence_gates import split_heads
from recallax.pallas_kernels import feature_maps
from recallax.types import Precision

type FeatureMap = Literal["identity", "elu", "relu", "taylor"]
FEATURE_MAPS = {
    "identity": feature_maps.identity,
    "elu": feature_maps.elu,
    "relu": feature_maps.relu,
    "taylor": feature_maps.taylor,
}
EPS = 1e-6
"""Added to the denominator, which is 0 where all features are 0 (possible with relu only)."""


@dataclass(frozen=True, kw_only=True)
class LinearAttention(MemoryConfig):
    """Causal linear attention with a feature map."""

    num_heads: int = 1
    """Number of heads."""
    feature_dim: int | None = None
    """Width of queries and keys per head before the feature map; None: d_model / num_heads."""
    feature_map: FeatureMap = "elu"
    """Feature map phi of queries and keys."""
    norm_eps: float = added_field(1e-5)
    """Added to the mean square in the output norm, which only the identity map has."""

    def head_dims(self, d_model: int) -> HeadDims:
        head_v_dim = head_dim_of("linear attention", d_model, self.num_heads)
        return HeadDims(self.num_heads, self.num_heads, self.feature_dim or head_v_dim, head_v_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        _, num_heads, head_k_dim, _ = self.head_dims(d_model)
        return Projections(
            {
                "k": Linear(d_model, num_heads * head_k_dim, precision=precision, rngs=rngs),
                "v": Linear(d_model, d_model, precision=precision, rngs=rngs),
            }
        )

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "LinearAttentionCell":
        cell = NormalizedLinearAttentionCell if self.normalized else LinearAttentionCell
        return cell(self.head_dims(d_model), self.feature_map, precision)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        order = "no_norm" if self.normalized else "gate_last"
        return OutputProjection(
            d_model,
            d_model,
            layer,
            num_groups=self.num_heads,
            order=order,
            norm_eps=self.norm_eps,
            precision=precision,
            rngs=rngs,
        )

    @property
    def normalized(self) -> bool:
        """True if the output is divided by the sum of its weights."""
        return self.feature_map != "identity"


class LinearAttentionCell(MatrixCell):
    """Matrix memory with a feature map on queries and keys: phi(q_t) S_t, without a denominator."""

    def __init__(self, head_dims: HeadDims, feature_map: FeatureMap, precision: Precision):
        width = jax.eval_shape(
            FEATURE_MAPS[feature_map], jax.ShapeDtypeStruct((head_dims.head_k_dim,), jnp.float32)
        ).shape[0]
        super().__init__(head_dims._replace(head_k_dim=width))
        self.feature_map, self.dtype = feature_map, precision.compute
        self.input_scale = head_dims.head_k_dim**-0.25 if feature_map in ("identity", "taylor") else 1.0

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        q, k, v = (split_heads(projections[name], self.head_dims.num_v_heads) for name in ("q", "k", "v"))
        return RecurrenceInputs(self._features(q), self._features(k), v)

    def _features(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
        return FEATURE_MAPS[self.feature_map](x.astype(jnp.float32) * self.input_scale).astype(self.dtype)


class NormalizedLinearAttentionCell(LinearAttentionCell):
    """Linear attention with its denominator, which is computed as one more value channel of ones."""

    def __init__(self, head_dims: HeadDims, feature_map: FeatureMap, precision: Precision):
        super().__init__(head_dims._replace(head_v_dim=head_dims.head_v_dim + 1), feature_map, precision)

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        inputs = super().recurrence_inputs(projections, positions)
        return inputs._replace(v=jnp.concatenate([inputs.v, jnp.ones_like(inputs.v[..., :1])], axis=-1))

    def cell_output(
        self, y: Float[Array, "B T H V"], projections: Mapping[str, Float[Array, "B T W"]]
    ) -> Float[Array, "B T H U"]:
        sums = y.astype(jnp.float32)
        return (sums[..., :-1] / (sums[..., -1:] + EPS)).astype(self.dtype)
