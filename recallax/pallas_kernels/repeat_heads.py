"""Query and key heads that several value heads share."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def repeat_heads(
    q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], num_v_heads: int, scale: float
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """scale * q, and k, each head repeated for the H / G value heads in a row that share it."""
    q = q * jnp.asarray(scale, q.dtype)
    share = num_v_heads // q.shape[2]
    return jnp.repeat(q, share, axis=2), jnp.repeat(k, share, axis=2)
