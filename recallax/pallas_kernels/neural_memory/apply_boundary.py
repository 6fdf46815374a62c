"""Nonlinear update of the weights at the boundary between two chunks.

Source: LaCT (Zhang et al. 2025, arXiv 2505.23884), section 3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.update_coefficients import FastWeights, OuterParams


def apply_boundary(
    inner_optimizer: InnerOptimizer, outer_params: OuterParams, old: FastWeights, new: FastWeights
) -> FastWeights:
    """Return the memory of one head after a chunk.

    Args:
        inner_optimizer: Defines the boundary rule.
        outer_params: Initial weights and norm of the network, of the head.
        old: Memory before the chunk.
        new: Memory after the gradient steps of the chunk.
    """
    if inner_optimizer.boundary == "none":
        return new

    def normalize(name: str, change: Array) -> Array:
        if inner_optimizer.boundary == "muon":
            change = old.delta[name] + newton_schulz(change - old.delta[name])
        origin = outer_params.initial_weights[name].astype(change.dtype)
        norm, weight = jnp.linalg.norm(origin, axis=0, keepdims=True), origin + change
        return weight * (norm / jnp.maximum(jnp.linalg.norm(weight, axis=0, keepdims=True), MIN_NORM)) - origin

    return new._replace(delta={name: normalize(name, change) for name, change in new.delta.items()})


MIN_NORM = 1e-6
"""Lower bound of a norm that is divided by."""
SQUARED_NORM_EPS = 1e-12
"""Added to the squared norm, so that the gradient at 0 is finite."""
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of x, x^3 and x^5 in one step."""


def newton_schulz(x: Float[Array, "I O"], steps: int = 5) -> Float[Array, "I O"]:
    """Approximate U V^T of x = U s V^T by Newton-Schulz steps of degree five; zero stays zero.

    The coefficients map all singular values to about [0.7, 1.2]. Source: Muon (Jordan et al. 2024).

    Args:
        x: Matrix.
        steps: Number of steps.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    x = x * jax.lax.rsqrt(jnp.sum(x * x) + SQUARED_NORM_EPS)
    for _ in range(steps):
        square = einsum_f32("io,jo->ij", x, x)
        x = a * x + einsum_f32("ij,jo->io", b * square + c * einsum_f32("ij,jk->ik", square, square), x)
    return x.T if wide else x
