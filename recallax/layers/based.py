"""BASED's linear attention: second-order Taylor features of narrow queries and keys, with a normaliser.

    y_t = W_o [ sum_{j<=t} f(s_tj) v_j / sum_{j<=t} f(s_tj) ],   f(s) = 1 + s + s^2/2,   s_tj = q_t.k_j / sqrt(d')

There are no positions, no gate and no output norm. State: F (V + 1) float32 per head with F = 1 + d' + d'(d'+1)/2 (153
at d' = 16), or F = 1 + d' + d'^2 (273) with all features, by which published checkpoints and state sizes count.
Source: Arora et al. 2024 (arXiv 2402.18668), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.memory import HeadDims, MemoryConfig, RecurrentCell
from recallax.layers.output_projection import OutputProjection
from recallax.layers.recurrence_gates import split_heads
from recallax.pallas_kernels.taylor_attention import (
    TaylorFeatures,
    TaylorState,
    num_features,
    taylor_attention,
    taylor_attention_step,
)
from recallax.types import Precision, StepInfo


@dataclass(frozen=True, kw_only=True)
class Based(MemoryConfig):
    """Taylor linear attention (BASED)."""

    feature_dim: int = 16
    """Width d' of queries and keys per head."""
    num_heads: int = 1
    """Number of heads."""
    features: TaylorFeatures = "symmetric"
    """Features in the state: without ("symmetric") or with ("full") duplicates; the outputs do not depend on it."""

    def head_dims(self, d_model: int) -> HeadDims:
        return HeadDims(self.num_heads, self.num_heads, self.feature_dim, head_dim_of("based", d_model, self.num_heads))

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        return Projections(
            {
                "k": Linear(d_model, self.num_heads * self.feature_dim, precision=precision, rngs=rngs),
                "v": Linear(d_model, d_model, precision=precision, rngs=rngs),
            }
        )

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "BasedCell":
        return BasedCell(self.head_dims(d_model), self.features)

    def output_proj(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> OutputProjection:
        return OutputProjection(d_model, d_model, layer, num_groups=1, order="no_norm", precision=precision, rngs=rngs)


class BasedCell(RecurrentCell):
    """Cell with the sums of Taylor features times values, and of Taylor features, per head."""

    def __init__(self, head_dims: HeadDims, features: TaylorFeatures):
        self.head_dims = head_dims
        self.features: TaylorFeatures = features

    def init_state(self, batch: int) -> TaylorState:
        shape = (batch, self.head_dims.num_v_heads, num_features(self.head_dims.head_k_dim, self.features))
        return TaylorState(jnp.zeros((*shape, self.head_dims.head_v_dim), jnp.float32), jnp.zeros(shape, jnp.float32))

    def run(
        self,
        projections: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        state: TaylorState | None,
        conv_segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], TaylorState]:
        q, k, v = (split_heads(projections[name], self.head_dims.num_v_heads) for name in ("q", "k", "v"))
        return taylor_attention(q, k, v, state=state, segment_ids=segment_ids, features=self.features)

    def step(
        self, projections: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: TaylorState
    ) -> tuple[Float[Array, "B H V"], TaylorState]:
        q, k, v = (
            split_heads(projections[name][:, None], self.head_dims.num_v_heads)[:, 0] for name in ("q", "k", "v")
        )
        return taylor_attention_step(q, k, v, state, jnp.asarray(info.active), features=self.features)
