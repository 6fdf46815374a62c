"""Rotation of rows with padding on the left, so that mixers see padding on the right only."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from recallax.pallas_kernels.grid import gather_tokens
from recallax.types import SeqInfo, check_shapes


def rotate_to_right_padding(
    tokens: Int[Array, "B T"], seq: SeqInfo
) -> tuple[Int[Array, "B T"], SeqInfo, Int[Array, " B"]]:
    """Rotate each row to the left by its leading padding.

    Args:
        tokens: Token ids.
        seq: Their sequence information; document id 0 is padding.

    Returns:
        The rotated tokens, their sequence information, and the shift of each row.
    """
    check_shapes(seq)
    segment_ids = jnp.asarray(seq.segment_ids)
    shift = jnp.argmax(segment_ids > 0, axis=1)
    source = (jnp.arange(segment_ids.shape[1])[None] + shift[:, None]) % segment_ids.shape[1]
    tokens, positions, segment_ids, prefix = (
        gather_tokens(jnp.asarray(x), source) for x in (tokens, seq.positions, segment_ids, seq.prefix)
    )
    return tokens, SeqInfo(positions, segment_ids, prefix, seq.key), shift
