"""Matrix products whose sums are float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from recallax.pallas_kernels.chunking import accumulator_dtype


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """`einsum(spec, a, b)` of operands of one dtype, accumulated and returned in float32; float64 stays what it is.

    float32 operands are multiplied exactly (accelerators would round them by default). XLA's CPU backend has no
    bfloat16 product with float32 sums for every shape, so there the operands are widened first: the same numbers.
    """
    if a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator_dtype(a.dtype), precision=exact)


def ragged_dot_f32(x: Array, weights: Array, group_sizes: Array) -> Array:
    """Rows of x [N, D] times their group's weights [M, D, W], in float32; group m is the next sizes[m] rows.

    As `einsum_f32`: float32 operands are multiplied exactly, bfloat16 ones are widened on a CPU.
    """
    if x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.ragged_dot(x, weights, group_sizes, precision=exact, preferred_element_type=jnp.float32)
