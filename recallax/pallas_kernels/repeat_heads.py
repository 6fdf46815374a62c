"""Grouped heads: query and key heads that several value heads share."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def repeat_heads(
    q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], num_v_heads: int, scale: float
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Scale the queries and repeat query and key heads for the consecutive value heads that share them.

    Args:
        q: Queries of G heads.
        k: Keys of G heads.
        num_v_heads: Number of value heads H, a multiple of G.
        scale: Factor of the queries.

    Returns:
        Scaled queries and keys of H heads.
    """
    q = q * jnp.asarray(scale, q.dtype)
    repeats = num_v_heads // q.shape[2]
    return jnp.repeat(q, repeats, axis=2), jnp.repeat(k, repeats, axis=2)
