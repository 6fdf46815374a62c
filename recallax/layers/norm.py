"""Root-mean-square and L2 normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.dense import parameter
from recallax.types import DType, Precision

L2_EPS = 1e-6
"""Added to the squared length inside the square root, so that a zero vector has a finite gradient."""


def rms_norm(x: Float[Array, "... D"], scale: Array, eps: float, dtype: DType) -> Float[Array, "... D"]:
    """Normalize by the root mean square of the last axis: x / sqrt(mean(x^2) + eps) * scale, computed in float32.

    Args:
        x: Values of any floating dtype.
        scale: Scale that broadcasts to `x`.
        eps: Added to the mean square.
        dtype: Dtype of the result.

    Returns:
        Normalized values.
    """
    x_f32 = x.astype(jnp.float32)
    x_f32 *= jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return (x_f32 * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(dtype)


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalize vectors along the last axis: x / sqrt(sum(x^2) + L2_EPS), computed in float32.

    Args:
        x: Vectors of any floating dtype.

    Returns:
        Vectors of length 1 in the dtype of `x`; a zero vector stays zero.
    """
    x_f32 = x.astype(jnp.float32)
    return (x_f32 * jax.lax.rsqrt(jnp.sum(x_f32 * x_f32, axis=-1, keepdims=True) + L2_EPS)).astype(x.dtype)


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
