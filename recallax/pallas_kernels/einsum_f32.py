"""Matrix products with float32 accumulation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from recallax.pallas_kernels.chunking import accumulator_dtype


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """Compute `einsum(spec, a, b)` with float32 accumulation; float64 operands are accumulated in float64.

    float32 operands use the highest precision, because accelerators round them by default. XLA's CPU backend does not
    support bfloat16 products with float32 accumulation for every shape, so bfloat16 operands are cast to float32 there,
    which gives the same values.

    Args:
        spec: Subscripts of `jnp.einsum`.
        a: First operand.
        b: Second operand, of the same dtype.

    Returns:
        The product in float32, or float64 for float64 operands.
    """
    if a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator_dtype(a.dtype), precision=precision)


def ragged_dot_f32(x: Array, weights: Array, group_sizes: Array) -> Array:
    """Multiply the rows of each group by the group's matrix, with float32 accumulation as in `einsum_f32`.

    Args:
        x: Rows [N, D], sorted by group.
        weights: One matrix per group [M, D, W].
        group_sizes: Number of consecutive rows of each group [M].

    Returns:
        Products [N, W] in float32.
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(x, weights, group_sizes, precision=precision, preferred_element_type=jnp.float32)
