"""Grouped heads: query and key heads that several value heads share."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import require


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


def check_grouped_queries(
    op: str,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    same_length: bool = True,
) -> None:
    """Check the shapes of softmax attention, in which H query heads share G key/value heads.

    Args:
        op: Name of the op, for the message.
        q: Queries.
        k: Keys.
        v: Values.
        same_length: S must be T: queries and keys are those of the same tokens.

    Raises:
        ValueError: There are no tokens, shapes do not match, or G does not divide H.
    """
    b, t, h, width = q.shape
    s, g = t if same_length else k.shape[1], k.shape[2]
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == (b, s, g, width), f"k has shape {k.shape}; it must be {(b, s, 'G', width)}")
    require(op, v.shape[:3] == (b, s, g), f"v has shape {v.shape}; it must begin with {(b, s, g)}")
    require(op, h % g == 0, f"{h} query heads cannot share {g} key/value heads; use a divisor of {h}")
