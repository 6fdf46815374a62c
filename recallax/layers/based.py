"""BASED's linear attention: second-order Taylor features of narrow queries and keys, normalised.

    y_t = W_o [ sum_{j<=t} f(s_tj) v_j / sum_{j<=t} f(s_tj) ],   f(s) = 1 + s + s^2/2,   s_tj = q_t.k_j / sqrt(d')

No positions, no gate, no output norm. State: F (V + 1) float32 per head with F = 1 + d' + d'(d'+1)/2 (153 at d' = 16),
or 1 + d' + d'^2 (273) in the full form that published checkpoints and state sizes count.
Source: Arora et al. 2024 (arXiv 2402.18668), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import heads_of
from recallax.layers.memory import Cell, MemoryConfig, Sizes
from recallax.layers.readout import Readout
from recallax.pallas_kernels.taylor_attention import (
    Features,
    TaylorState,
    state_width,
    taylor_attention,
    taylor_attention_step,
)
from recallax.types import Precision, StepInfo


@dataclass(frozen=True, kw_only=True)
class Based(MemoryConfig):
    """BASED's Taylor linear attention."""

    feature_dim: int = 16
    """Width d' of queries and keys per head."""
    heads: int = 1
    features: Features = "symmetric"
    """Features that the state holds; the outputs do not depend on it."""

    def sizes(self, d_model: int) -> Sizes:
        return Sizes(self.heads, self.heads, self.feature_dim, divide_heads("based", d_model, self.heads))

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        return Streams(
            {
                "k": Linear(d_model, self.heads * self.feature_dim, precision=precision, rngs=rngs),
                "v": Linear(d_model, d_model, precision=precision, rngs=rngs),
            }
        )

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "TaylorCell":
        return TaylorCell(self.sizes(d_model), self.features)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        return Readout(d_model, d_model, site, groups=1, gate=None, order="no norm", precision=precision, rngs=rngs)


class TaylorCell(Cell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, features: Features):
        self.sizes = sizes
        self.features: Features = features

    def init_state(self, batch: int) -> TaylorState:
        shape = (batch, self.sizes.heads, state_width(self.sizes.keys, self.features))
        return TaylorState(jnp.zeros((*shape, self.sizes.values), jnp.float32), jnp.zeros(shape, jnp.float32))

    def run(
        self,
        streams: Mapping[str, Float[Array, "B T W"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        state: TaylorState | None,
        stretches: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], TaylorState]:
        q, k, v = (heads_of(streams[name], self.sizes.heads) for name in ("q", "k", "v"))
        return taylor_attention(q, k, v, state=state, segments=segments, features=self.features)

    def step(
        self, streams: Mapping[str, Float[Array, "B W"]], info: StepInfo, state: TaylorState
    ) -> tuple[Float[Array, "B H V"], TaylorState]:
        q, k, v = (heads_of(streams[name][:, None], self.sizes.heads)[:, 0] for name in ("q", "k", "v"))
        return taylor_attention_step(q, k, v, state, jnp.asarray(info.active), features=self.features)
