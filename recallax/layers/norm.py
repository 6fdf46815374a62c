"""Root-mean-square and L2 normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.dense import parameter
from recallax.types import DType, Precision


def rms_norm(x: Float[Array, "... D"], scale: Array, eps: float, dtype: DType) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; in float32, returned in `dtype`."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(dtype)


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32, returned in x's dtype.

    The constant stands inside the root, so that a zero vector has a gradient.
    """
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale over the last axis; computed in float32, returned in the compute dtype.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """

    def __init__(self, width: int, *, precision: Precision, eps: float = 1e-5):
        self.scale = parameter(jnp.ones(width, precision.param), (None,), weight_decay=False)
        self.dtype = precision.compute
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], self.eps, self.dtype)
