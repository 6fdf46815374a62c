"""Feature maps of linear attention: phi with phi(q).phi(k) standing in for exp(q.k).

Each maps the last axis K to F features; sources: elu+1 Katharopoulos et al. 2020 (arXiv 2006.16236) equation 7,
Taylor Arora et al. 2024 (BASED, arXiv 2402.18668) section 4.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def identity(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """phi(x) = x."""
    return x


def elu(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """phi(x) = elu(x) + 1, positive."""
    return jax.nn.elu(x) + 1


def relu(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """phi(x) = max(x, 0)."""
    return jax.nn.relu(x)


def taylor_full(x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """[1, x, vec(x x^T) / sqrt 2]: phi(q).phi(k) = 1 + s + s^2/2 with s = q.k; F = 1 + K + K^2 (273 at K = 16)."""
    square = x[..., :, None] * x[..., None, :] * math.sqrt(0.5)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square.reshape(*x.shape[:-1], -1)], axis=-1)


def taylor(x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    """The same kernel with x_i x_j once per pair: F = 1 + K + K(K+1)/2 (153 at K = 16).

    Order: constant, x, then for each i: x_i^2 / sqrt 2, x_i x_{i+1}, ..., x_i x_K.
    """
    parts = [jnp.ones_like(x[..., :1]), x]
    for i in range(x.shape[-1]):  # slices, not a gather: its gradient would be a scatter
        first = x[..., i : i + 1]
        parts += [first * first * math.sqrt(0.5), first * x[..., i + 1 :]]
    return jnp.concatenate(parts, axis=-1)


def taylor_score(s: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + s + s^2/2, the Taylor polynomial of exp; at least 1/2 everywhere."""
    return 1 + s + 0.5 * s * s
