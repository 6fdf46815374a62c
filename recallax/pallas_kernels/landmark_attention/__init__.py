"""Landmark attention: a grouped softmax in which a landmark token per block opens the block.

    w_ij = p_ij for j in i's own block;   w_ij = p_i,lm(b) r_ij for j in an earlier block b;   0 for landmarks

p is the softmax of scale * q.k over the own block's tokens and all earlier landmarks, r the one over the tokens of one
block. State: `LandmarkCache`. Grouped queries: H query heads share G key/value heads, G dividing H.
Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.dispatch import call, kernel, require
from recallax.pallas_kernels.landmark_attention import xla
from recallax.pallas_kernels.landmark_attention.blocks import LandmarkCache
from recallax.pallas_kernels.landmark_attention.cache import begin, continued_blocks, empty_cache, extended, finish
from recallax.pallas_kernels.landmark_attention.retrieval import (
    Distances,
    Per,
    Retrieval,
    Taken,
    Turn,
    look,
    read,
    read_all,
    retrieve,
    retrieve_step,
    turned_home,
)

__all__ = [
    "FORMS",
    "Distances",
    "LandmarkCache",
    "Per",
    "Retrieval",
    "Taken",
    "Turn",
    "begin",
    "continued_blocks",
    "empty_cache",
    "extended",
    "finish",
    "landmark_attention",
    "look",
    "read",
    "read_all",
    "retrieve",
    "retrieve_step",
    "turned_home",
]

FORMS = {
    "reference": xla.dense,
    "xla": xla.blockwise,
    "mosaic_gpu": kernel("recallax.pallas_kernels.landmark_attention.mosaic_gpu", "landmark_attention"),
    "mosaic_tpu": kernel("recallax.pallas_kernels.landmark_attention.mosaic_tpu", "landmark_attention"),
}


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    real: int,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    past: LandmarkCache | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Output in v's dtype, also at landmarks.

    real: tokens of a block besides its landmark, which is every token whose position leaves `real` modulo real + 1.
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
    require(op, real >= 1, f"real is {real}; a block needs at least 1 token besides its landmark")
    if past is not None:
        shape = past.k.shape
        require(op, shape[2:] == (real, g, width), f"past.k has shape {shape}; it must end in {(real, g, width)}")
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    return call(op, FORMS, implementation, q, k, v, segments, positions, real, past).astype(v.dtype)
