"""What happens to the weights between two chunks and is not linear in the gradients.

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
    """The memory of one head after a chunk, from the one before it and the one that was learned."""
    if inner_optimizer.boundary == "none":
        return new

    def settle(name: str, change: Array) -> Array:
        if inner_optimizer.boundary == "muon":
            change = old.delta[name] + newton_schulz(change - old.delta[name])
        origin = outer_params.initial_weights[name].astype(change.dtype)
        norm, weight = jnp.linalg.norm(origin, axis=0, keepdims=True), origin + change
        return weight * (norm / jnp.maximum(jnp.linalg.norm(weight, axis=0, keepdims=True), 1e-6)) - origin

    return new._replace(delta={name: settle(name, change) for name, change in new.delta.items()})


NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Float[Array, "I O"], steps: int = 5) -> Float[Array, "I O"]:
    """Roughly U V^T of x = U s V^T, by Newton-Schulz steps of degree five; zero stays zero.

    Source: Muon (Jordan et al. 2024), whose coefficients bring every singular value into about [.7, 1.2].
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    # The root is taken of something positive, also in its gradient.
    x = x * jax.lax.rsqrt(jnp.sum(x * x) + 1e-12)
    for _ in range(steps):
        square = einsum_f32("io,jo->ij", x, x)
        x = a * x + einsum_f32("ij,jo->io", b * square + c * einsum_f32("ij,jk->ik", square, square), x)
    return x.T if wide else x
