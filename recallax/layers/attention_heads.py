"""Checks of head sizes that all attention mixers share."""

from recallax.config import ConfigError, require_at_least
from recallax.layers.dense import head_dim_of
from recallax.layers.rotary import check_rope_theta


def attention_head_dim(
    name: str, d_model: int, *, num_heads: int, num_kv_heads: int, head_dim: int | None, rope_theta: float | None
) -> int:
    """Check the sizes of attention heads and compute their width.

    Args:
        name: Name of the mixer, for error messages.
        d_model: Width of the model.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head; None: d_model / num_heads.
        rope_theta: Base of the rotary embedding; None: no positional embedding.

    Returns:
        The width of a head.

    Raises:
        ConfigError: `num_heads` does not divide `d_model` if `head_dim` is None, `num_kv_heads` does not divide
            `num_heads`, `rope_theta` is not above 0, or rotary positions are used with an odd width.
    """
    check_rope_theta(rope_theta)
    if head_dim is not None:
        require_at_least(1, head_dim=head_dim)
    width = head_dim or head_dim_of(name, d_model, num_heads)
    head_dim_of(f"{name}'s query heads over key/value heads", num_heads, num_kv_heads)
    if rope_theta is not None and width % 2:
        raise ConfigError(f"a head is {width} wide; rotary positions need an even width (or rope_theta=None)")
    return width
