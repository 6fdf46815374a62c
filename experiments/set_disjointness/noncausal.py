"""The non-causal control: BASED's Taylor attention in which every token attends to the whole document (JRT, section 3).

    y_i = sum_j f(s_ij) v_j / sum_j f(s_ij)   over all j of the document

It has no state and cannot decode, so it is not part of `recallax.layers`.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers import LayerInfo, MixerConfig, SequenceMixer
from recallax.layers.dense import Linear, head_dim_of, residual_std
from recallax.pallas_kernels.feature_maps import taylor_score
from recallax.types import Aux, Precision, SeqInfo


@dataclass(frozen=True, kw_only=True)
class NonCausalBased(MixerConfig):
    """Taylor linear attention without the causal mask."""

    feature_dim: int = 16
    """Width of queries and keys before the feature map."""
    num_heads: int = 1
    """Number of heads."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "NonCausalBasedMixer":
        return NonCausalBasedMixer(self, d_model, layer, precision=precision, rngs=rngs)


class NonCausalBasedMixer(SequenceMixer):
    """Taylor attention over whole documents; see `NonCausalBased`."""

    def __init__(self, config: NonCausalBased, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        head_dim_of("based", d_model, config.num_heads)
        self.num_heads, self.feature_dim = config.num_heads, config.feature_dim
        self.q = Linear(d_model, self.num_heads * self.feature_dim, precision=precision, rngs=rngs)
        self.k = Linear(d_model, self.num_heads * self.feature_dim, precision=precision, rngs=rngs)
        self.v = Linear(d_model, d_model, precision=precision, rngs=rngs)
        self.out = Linear(d_model, d_model, precision=precision, rngs=rngs, std=residual_std(layer.num_layers))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        segments = jnp.asarray(seq.segment_ids)
        q, k, v = (part(x).reshape(*x.shape[:2], self.num_heads, -1) for part in (self.q, self.k, self.v))
        weights = taylor_score(jnp.einsum("bihk,bjhk->bhij", q, k) * self.feature_dim**-0.5)
        same_document = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
        weights = jnp.where(same_document[:, None], weights, 0)
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 0.5)
        return self.out(jnp.einsum("bhij,bjhv->bihv", weights, v).reshape(x.shape)), {}
