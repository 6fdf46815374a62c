"""Landmark attention: a grouped softmax in which a landmark token per block opens the block.

    w_ij = p_ij for j in i's own block;   w_ij = p_i,lm(b) r_ij for j in an earlier block b;   0 for landmarks

p is the softmax of scale * q.k over the own block's tokens and all earlier landmarks, r the one over the tokens of one
block. State: `LandmarkCache`. Grouped queries: H query heads share G key/value heads, G dividing H.
Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernel, require
from recallax.pallas_kernels.landmark_attention import xla
from recallax.pallas_kernels.landmark_attention.block_retrieval import (
    BlockRetrieval,
    GatheredBlocks,
    PositionMode,
    Rotate,
    SelectionScope,
    attend_all_blocks,
    attend_selected_blocks,
    retrieval_attention,
    retrieval_attention_step,
    rotate_cache_to_true_positions,
    select_cached_blocks,
)
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache
from recallax.pallas_kernels.landmark_attention.landmark_cache import (
    append_to_partial_block,
    cached_and_new_blocks,
    close_partial_block,
    init_landmark_cache,
    update_cache_and_log_probs,
)

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
    "mosaic_gpu": lazy_kernel("recallax.pallas_kernels.landmark_attention.mosaic_gpu", "landmark_attention"),
    "mosaic_tpu": lazy_kernel("recallax.pallas_kernels.landmark_attention.mosaic_tpu", "landmark_attention"),
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
    """Output in v's dtype, also at landmarks.

    real: tokens of a block besides its landmark, which is every token whose position leaves `block_size` modulo real + 1.
    positions: within the document, one after another. segments: document ids, 0 is padding. past: blocks that the row's
    first document has already, with keys as these queries meet them (rotated where the new ones are); its first
    position counts their tokens. scale: K**-0.5 by default. Raises ValueError where shapes disagree.
    """
    op = "landmark_attention"
    b, t, h, width = q.shape
    g = k.shape[2]
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == (b, t, g, width), f"k has shape {k.shape}; it must be {(b, t, 'G', width)}")
    require(op, v.shape[:3] == (b, t, g), f"v has shape {v.shape}; it must begin with {(b, t, g)}")
    require(op, h % g == 0, f"{h} query heads cannot share {g} key/value heads; use a divisor of {h}")
    require(op, block_size >= 1, f"block_size is {block_size}; a block needs at least 1 token besides its landmark")
    if cache is not None:
        shape = cache.k.shape
        require(
            op,
            shape[2:] == (block_size, g, width),
            f"past.k has shape {shape}; it must end in {(block_size, g, width)}",
        )
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    return call_implementation(
        op, IMPLEMENTATIONS, implementation, q, k, v, segment_ids, positions, block_size, cache
    ).astype(v.dtype)
