"""Landmark attention: a grouped softmax in which one landmark token per block gates the block.

    w_ij = p_ij for j in i's own block;   w_ij = p_i,lm(b) r_ij for j in an earlier block b;   0 for landmarks

p is the softmax of scale * q.k over the tokens of i's own block and all earlier landmarks; r is the softmax over the
tokens of one block. State: `LandmarkCache`. Grouped queries: H query heads share G key/value heads, G dividing H.
Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernels, require
from recallax.pallas_kernels.grouped_heads import check_grouped_queries
from recallax.pallas_kernels.landmark_attention import xla
from recallax.pallas_kernels.landmark_attention.block_retrieval import (
    GatheredBlocks,
    attend_all_blocks,
    attend_selected_blocks,
    retrieval_attention,
    retrieval_attention_step,
    rotate_cache_to_true_positions,
    select_cached_blocks,
)
from recallax.pallas_kernels.landmark_attention.block_selection import (
    BlockRetrieval,
    PositionMode,
    Rotate,
    SelectionScope,
)
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache
from recallax.pallas_kernels.landmark_attention.landmark_cache import (
    append_to_partial_block,
    cached_and_new_blocks,
    close_partial_block,
    init_landmark_cache,
    update_cache_and_log_probs,
)
from recallax.pallas_kernels.landmark_attention.reference import LandmarkAttentionArgs

__all__ = [
    "IMPLEMENTATIONS",
    "BlockRetrieval",
    "GatheredBlocks",
    "LandmarkCache",
    "PositionMode",
    "Rotate",
    "SelectionScope",
    "append_to_partial_block",
    "attend_all_blocks",
    "attend_selected_blocks",
    "cached_and_new_blocks",
    "close_partial_block",
    "init_landmark_cache",
    "landmark_attention",
    "retrieval_attention",
    "retrieval_attention_step",
    "rotate_cache_to_true_positions",
    "select_cached_blocks",
    "update_cache_and_log_probs",
]

IMPLEMENTATIONS = {
    "reference": xla.dense,
    "xla": xla.blockwise,
    **lazy_kernels("landmark_attention", "mosaic_gpu", "mosaic_tpu"),
}


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    block_size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    cache: LandmarkCache | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Compute landmark attention over whole rows; landmarks have an output too.

    Args:
        q: Queries of H heads, which share G key/value heads.
        k: Keys.
        v: Values; those of landmarks are ignored.
        block_size: Tokens of a block besides its landmark: position p is a landmark if p mod (block_size + 1) equals
            block_size.
        positions: Consecutive positions within documents. The first position of a row is the number of tokens in its
            cache.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        cache: Blocks of the row's first document before the row, with keys rotated as the new ones; None: no tokens.
        scale: Factor of q; None: K**-0.5.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output in v's dtype.

    Raises:
        ValueError: Shapes do not match.
    """
    op = "landmark_attention"
    check_grouped_queries(op, q, k, v)
    g, width = k.shape[2:]
    require(op, block_size >= 1, f"block_size is {block_size}; a block needs at least 1 token besides its landmark")
    if cache is not None:
        shape = cache.k.shape
        require(
            op,
            shape[2:] == (block_size, g, width),
            f"cache.k has shape {shape}; it must end in {(block_size, g, width)}",
        )
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    args = LandmarkAttentionArgs(q, k, v, segment_ids, positions, block_size, cache)
    return call_implementation(op, IMPLEMENTATIONS, implementation, args).astype(v.dtype)
