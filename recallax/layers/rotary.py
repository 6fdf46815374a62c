"""Rotary position embedding, and random gaps between positions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from recallax.config import ConfigError
from recallax.pallas_kernels.grid import gather_tokens


def check_rope_theta(rope_theta: float | None) -> None:
    """Check the base of a rotary embedding.

    Args:
        rope_theta: Base of the frequencies; None: no positional embedding.

    Raises:
        ConfigError: The base is not above 0 and finite.
    """
    if rope_theta is not None and not 0 < rope_theta < math.inf:
        raise ConfigError(f"rope_theta is {rope_theta}; it must be above 0 and finite (usual: 10000)")


def rotary(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], rope_theta: float = 10_000.0
) -> Float[Array, "B T H K"]:
    """Rotate the pairs (x_i, x_{i+K/2}) by positions * rope_theta^(-2i/K).

    Source: Su et al. 2021 (RoFormer, arXiv 2104.09864), equation 34, in the half-split layout of GPT-NeoX.

    Args:
        x: Queries or keys; K is even.
        positions: Position of each token.
        rope_theta: Base of the frequencies.

    Returns:
        Rotated vectors in the dtype of `x`; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def rotate_by_distance(
    rope_theta: float | None, x: Float[Array, "... K"], distance: Int[Array, "..."]
) -> Float[Array, "... K"]:
    """Rotate vectors by one distance each.

    Args:
        rope_theta: Base of the frequencies; None returns `x`.
        x: Vectors with any leading axes.
        distance: Distance of each vector.

    Returns:
        Rotated vectors in the dtype of `x`.
    """
    if rope_theta is None:
        return x
    return rotary(x.reshape(1, -1, 1, x.shape[-1]), distance.reshape(1, -1), rope_theta).reshape(x.shape)


def add_position_jumps(
    positions: Int[Array, "B T"], block_size: int, max_jump: int, key: PRNGKeyArray
) -> Int[Array, "B T"]:
    """Add a random gap before each block of a document except the first.

    Args:
        positions: Position of each token within its document.
        block_size: Tokens of a block, including its landmark.
        max_jump: Largest gap.
        key: Random key.

    Returns:
        Positions with gaps that are uniform in [0, max_jump].
    """
    gaps = jax.random.randint(key, positions.shape, 0, max_jump + 1, positions.dtype)
    total = jnp.cumsum(jnp.where((positions % block_size == 0) & (positions > 0), gaps, 0), axis=1)
    document_start = jnp.maximum(jnp.arange(positions.shape[1])[None] - positions, 0)
    return positions + total - gather_tokens(total, document_start)
