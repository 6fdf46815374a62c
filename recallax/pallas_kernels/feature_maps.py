"""Feature maps phi of linear attention: phi(q).phi(k) approximates exp(q.k).

Each maps the last axis K to F features. Sources: elu + 1 is equation 7 of Katharopoulos et al. 2020 (arXiv 2006.16236);
the Taylor expansion is section 4 of Arora et al. 2024 (BASED, arXiv 2402.18668).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def identity(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """Identity map: phi(x) = x."""
    return x


def elu(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """Positive map: phi(x) = elu(x) + 1."""
    return jax.nn.elu(x) + 1


def relu(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """Rectifier: phi(x) = max(x, 0)."""
    return jax.nn.relu(x)


def taylor_full(x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """Second-order Taylor features with the full outer product.

    phi(x) = [1, x, vec(x x^T) / sqrt 2], so phi(q).phi(k) = 1 + s + s^2/2 with s = q.k.
    F = 1 + K + K^2 (273 at K = 16).
    """
    square = x[..., :, None] * x[..., None, :] * math.sqrt(0.5)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square.reshape(*x.shape[:-1], -1)], axis=-1)


def taylor(x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """Second-order Taylor features with each product x_i x_j once; phi(q).phi(k) equals that of `taylor_full`.

    Order: 1, x, then for each i: x_i^2 / sqrt 2, x_i x_{i+1}, ..., x_i x_K. F = 1 + K + K(K+1)/2 (153 at K = 16).
    """
    parts = [jnp.ones_like(x[..., :1]), x]
    for i in range(x.shape[-1]):  # slices instead of a gather, whose gradient is a scatter
        first = x[..., i : i + 1]
        parts += [first * first * math.sqrt(0.5), first * x[..., i + 1 :]]
    return jnp.concatenate(parts, axis=-1)


def taylor_score(s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Second-order Taylor polynomial of exp, 1 + s + s^2/2; it is at least 1/2 everywhere."""
    return 1 + s + 0.5 * s * s
