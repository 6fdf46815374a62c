"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], rope_theta: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """Rotate the pairs (x_i, x_{i+K/2}) by positions * base^(-2i/K); angles in float32, result in x's dtype.

    Source: Su et al. 2021 (RoFormer, arXiv 2104.09864), equation 34, in the half-split layout of GPT-NeoX.
    """
    half = x.shape[-1] // 2
    rate = rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * rate[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
