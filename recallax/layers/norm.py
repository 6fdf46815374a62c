"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.dense import parameter
from recallax.types import Precision


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last axis; computed in float32, returned in the compute dtype.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def __init__(self, width: int, *, precision: Precision, eps: float = 1e-5):
        self.scale = parameter(jnp.ones(width, precision.param), (None,), decay=False)
        self.dtype = precision.compute
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        gain = jnp.broadcast_to(self.scale[...].astype(jnp.float32), x.shape)
        return (wide * scale * gain).astype(self.dtype)
