"""Linear attention with a choice of feature map.

    y_t = phi(q_t) S_t / (phi(q_t) z_t + eps),   S_t = sum_{j<=t} phi(k_j) v_j^T,   z_t = sum_{j<=t} phi(k_j)

The identity map can make the denominator vanish; with it y_t = RMSNorm(q_t S_t) per head instead (Qin et al. 2022,
arXiv 2210.10340). Rotary positions are left out, as in BASED.

State: F (V + 1) float32 per head, F the width of the feature map; F V with the identity map.
Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 16 to 20.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import MixerConfig, RecurrentMixer, Site
from recallax.layers.continuation import continued, divide_heads, started
from recallax.layers.dense import Linear, residual_std
from recallax.layers.norm import RMSNorm
from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.linear_attention import linear_attention, linear_attention_step
from recallax.types import Aux, Precision, SeqInfo, StepInfo

MAPS = {
    "identity": feature_maps.identity,
    "elu": feature_maps.elu,
    "relu": feature_maps.relu,
    "taylor": feature_maps.taylor,
}
EPS = 1e-6
"""Keeps the denominator off zero where every feature is (possible with relu only)."""


@dataclass(frozen=True, kw_only=True)
class LinearAttention(MixerConfig):
    """Causal linear attention."""

    heads: int = 1
    feature_dim: int | None = None
    """Width of queries and keys per head before the feature map; None is that of the values."""
    feature_map: Literal["identity", "elu", "relu", "taylor"] = "elu"

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "LinearAttentionMixer":
        return LinearAttentionMixer(self, d_model, site, precision=precision, rngs=rngs)


class LinearState(NamedTuple):
    """Sum of phi(k) [v, 1]^T; the last column, of ones, is the denominator (absent with the identity map)."""

    kv: Float[Array, "B H F V+1"]


class LinearAttentionMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: LinearAttention, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.heads, self.name = config.heads, config.feature_map
        self.values = divide_heads("linear attention", d_model, config.heads)
        self.width = config.feature_dim or self.values
        self.dtype = precision.compute
        self.q = Linear(d_model, self.heads * self.width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, self.heads * self.width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, d_model, precision=precision, rngs=rngs)
        self.norm = RMSNorm(self.values, precision=precision) if self.name == "identity" else None
        self.out = Linear(
            d_model, d_model, precision=precision, rngs=rngs, std=residual_std(site.depth), axes=("heads", "embed")
        )

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        q, k, v = self._project(x)
        sums, _ = linear_attention(q, k, v, segments=jnp.asarray(seq.segments), scale=1.0)
        return self._read(sums, x), {}

    def init_state(self, batch: int, max_len: int) -> LinearState:
        features = jax.eval_shape(MAPS[self.name], jax.ShapeDtypeStruct((self.width,), jnp.float32)).shape[0]
        columns = self.values + (self.norm is None)
        return LinearState(jnp.zeros((batch, self.heads, features, columns), jnp.float32))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: LinearState
    ) -> tuple[Float[Array, "B T D"], LinearState, Aux]:
        q, k, v = self._project(x)
        kv = continued(state, seq).kv
        sums, kv = linear_attention(q, k, v, state=kv, segments=jnp.asarray(seq.segments), scale=1.0)
        return self._read(sums, x), LinearState(kv), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: LinearState
    ) -> tuple[Float[Array, "B D"], LinearState]:
        q, k, v = (part[:, 0] for part in self._project(x[:, None]))
        sums, kv = linear_attention_step(q, k, v, started(state, info).kv, jnp.asarray(info.active), scale=1.0)
        return self._read(sums, x), LinearState(kv)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        shape = (*x.shape[:2], self.heads, -1)
        q, k = (self._features(part(x).reshape(shape)) for part in (self.q, self.k))
        v = self.v(x).reshape(shape)
        return q, k, v if self.norm else jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

    def _features(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
        scaled = x.astype(jnp.float32) * (self.width**-0.25 if self.name in ("identity", "taylor") else 1.0)
        return MAPS[self.name](scaled).astype(self.dtype)

    def _read(self, sums: Float[Array, "... H W"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.norm is not None:
            return self.out(self.norm(sums).reshape(x.shape))
        sums = sums.astype(jnp.float32)
        y = sums[..., :-1] / (sums[..., -1:] + EPS)
        return self.out(y.astype(self.dtype).reshape(x.shape))
