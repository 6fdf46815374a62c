"""BASED's linear attention: second-order Taylor features of narrow queries and keys, normalised.

    y_t = W_o [ sum_{j<=t} f(s_tj) v_j / sum_{j<=t} f(s_tj) ],   f(s) = 1 + s + s^2/2,   s_tj = q_t.k_j / sqrt(d')

No positions, no gate, no output norm. State: F (V + 1) float32 per head with F = 1 + d' + d'(d'+1)/2 (153 at d' = 16),
or 1 + d' + d'^2 (273) in the full form that published checkpoints and state sizes count.
Source: Arora et al. 2024 (arXiv 2402.18668), section 4.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import MixerConfig, RecurrentMixer, Site
from recallax.layers.continuation import continued, divide_heads, started
from recallax.layers.dense import Linear, residual_std
from recallax.pallas_kernels.taylor_attention import (
    Features,
    TaylorState,
    state_width,
    taylor_attention,
    taylor_attention_step,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class Based(MixerConfig):
    """BASED's Taylor linear attention."""

    feature_dim: int = 16
    """Width d' of queries and keys per head."""
    heads: int = 1
    features: Features = "symmetric"
    """Features that the state holds; the outputs do not depend on it."""

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "BasedMixer":
        return BasedMixer(self, d_model, site, precision=precision, rngs=rngs)


class BasedMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: Based, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.heads = config.heads
        self.features: Features = config.features
        self.width, self.values = config.feature_dim, divide_heads("based", d_model, config.heads)
        self.q = Linear(d_model, self.heads * self.width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, self.heads * self.width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, d_model, precision=precision, rngs=rngs)
        self.out = Linear(
            d_model, d_model, precision=precision, rngs=rngs, std=residual_std(site.depth), axes=("heads", "embed")
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        q, k, v = self._project(x)
        y, _ = taylor_attention(q, k, v, segments=jnp.asarray(seq.segments), features=self.features)
        return self.out(y.reshape(x.shape)), {}

    def init_state(self, batch: int, max_len: int) -> TaylorState:
        shape = (batch, self.heads, state_width(self.width, self.features))
        return TaylorState(jnp.zeros((*shape, self.values), jnp.float32), jnp.zeros(shape, jnp.float32))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: TaylorState
    ) -> tuple[Float[Array, "B T D"], TaylorState, Aux]:
        q, k, v = self._project(x)
        state = continued(state, seq)
        y, state = taylor_attention(q, k, v, state=state, segments=jnp.asarray(seq.segments), features=self.features)
        return self.out(y.reshape(x.shape)), state, {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: TaylorState
    ) -> tuple[Float[Array, "B D"], TaylorState]:
        q, k, v = (part[:, 0] for part in self._project(x[:, None]))
        state = started(state, info)
        y, state = taylor_attention_step(q, k, v, state, jnp.asarray(info.active), features=self.features)
        return self.out(y.reshape(x.shape)), state

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        shape = (*x.shape[:2], self.heads, -1)
        return self.q(x).reshape(shape), self.k(x).reshape(shape), self.v(x).reshape(shape)
