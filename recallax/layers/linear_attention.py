"""Linear attention with a choice of feature map.

    y_t = phi(q_t) S_t / (phi(q_t) z_t + eps),   S_t = sum_{j<=t} phi(k_j) v_j^T,   z_t = sum_{j<=t} phi(k_j)

The identity map can make the denominator vanish; with it y_t = RMSNorm(q_t S_t) per head instead (Qin et al. 2022,
arXiv 2210.10340). Rotary positions are left out, as in BASED.

State: F (V + 1) float32 per head, F the width of the feature map; F V with the identity map.
Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 16 to 20.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import heads_of
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.readout import Readout
from recallax.pallas_kernels import feature_maps
from recallax.types import Precision

type FeatureMap = Literal["identity", "elu", "relu", "taylor"]
MAPS = {
    "identity": feature_maps.identity,
    "elu": feature_maps.elu,
    "relu": feature_maps.relu,
    "taylor": feature_maps.taylor,
}
EPS = 1e-6
"""Keeps the denominator off zero where every feature is (possible with relu only)."""


@dataclass(frozen=True, kw_only=True)
class LinearAttention(MemoryConfig):
    """Causal linear attention."""

    heads: int = 1
    feature_dim: int | None = None
    """Width of queries and keys per head before the feature map; None is that of the values."""
    feature_map: FeatureMap = "elu"
    eps: float = added(1e-5)
    """Of the output norm, which the identity map has."""

    def sizes(self, d_model: int) -> Sizes:
        values = divide_heads("linear attention", d_model, self.heads)
        return Sizes(self.heads, self.heads, self.feature_dim or values, values)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        _, heads, keys, _ = self.sizes(d_model)
        return Streams(
            {
                "k": Linear(d_model, heads * keys, precision=precision, rngs=rngs),
                "v": Linear(d_model, d_model, precision=precision, rngs=rngs),
            }
        )

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "LinearCell":
        kind = NormalisedCell if self.normalised else LinearCell
        return kind(self.sizes(d_model), self.feature_map, precision)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        order = "no norm" if self.normalised else "gate last"
        return Readout(
            d_model,
            d_model,
            site,
            groups=self.heads,
            gate=None,
            order=order,
            eps=self.eps,
            precision=precision,
            rngs=rngs,
        )

    @property
    def normalised(self) -> bool:
        """What is read is divided by the sum of its weights."""
        return self.feature_map != "identity"


class LinearCell(MatrixCell):
    """phi(q_t) S_t, without its denominator."""

    def __init__(self, sizes: Sizes, feature_map: FeatureMap, precision: Precision):
        width = jax.eval_shape(MAPS[feature_map], jax.ShapeDtypeStruct((sizes.keys,), jnp.float32)).shape[0]
        super().__init__(sizes._replace(keys=width))
        self.name, self.dtype = feature_map, precision.compute
        self.size = sizes.keys**-0.25 if feature_map in ("identity", "taylor") else 1.0

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        q, k, v = (heads_of(streams[name], self.sizes.heads) for name in ("q", "k", "v"))
        return Recurrence(self._features(q), self._features(k), v)

    def _features(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H F"]:
        return MAPS[self.name](x.astype(jnp.float32) * self.size).astype(self.dtype)


class NormalisedCell(LinearCell):
    """The same with its denominator, as one more column of values, all ones."""

    def __init__(self, sizes: Sizes, feature_map: FeatureMap, precision: Precision):
        super().__init__(sizes._replace(values=sizes.values + 1), feature_map, precision)

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        plain = super().recurrence(streams, positions)
        return plain._replace(v=jnp.concatenate([plain.v, jnp.ones_like(plain.v[..., :1])], axis=-1))

    def read(self, y: Float[Array, "B T H V"], streams: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "B T H U"]:
        sums = y.astype(jnp.float32)
        return (sums[..., :-1] / (sums[..., -1:] + EPS)).astype(self.dtype)
