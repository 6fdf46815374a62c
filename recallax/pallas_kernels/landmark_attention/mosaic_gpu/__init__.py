"""Landmark attention on Hopper: one pass over the blocks with a running softmax, and a split backward pass.

Two warpgroups process 64 queries of a head each, and a third loads the keys and values that both need: first the tiles
of tokens that hold their own blocks, then the complete blocks of the documents that they belong to, straight from the
row, wherever they start in it. A past block enters as one logit, its landmark's, whose value is the average inside the
block. `landmark_visibility.py` computes what queries see, `landmark_tiles.py` processes a tile, and `backward.py` has
the backward pass.
"""

from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.backward import landmark_attention_bwd
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.forward import (
    landmark_attention_fwd,
    landmark_attention_primal,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_tiles import NUM_CONSUMER_WGS, LandmarkKernelConfig
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_visibility import compute_visibility
from recallax.pallas_kernels.landmark_attention.reference import LandmarkAttentionArgs
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import pad_tokens, require_bfloat16, require_head_dims
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import kernel_custom_vjp
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK

PADDED_BLOCK_SIZES = (16, 32, 64)
"""Slots of a block: its tokens and the landmark are padded to the smallest that holds them, so that tiles are full."""

_landmark_attention = kernel_custom_vjp(landmark_attention_primal, landmark_attention_fwd, landmark_attention_bwd)


def landmark_attention(args: LandmarkAttentionArgs) -> Float[Array, "B T H V"]:
    """Compute landmark attention over whole rows on Hopper.

    The arguments and the result are those of `landmark_attention.xla.dense`.

    Raises:
        Unsupported: If an argument is not supported, or if there is neither a GPU nor `interpret_kernels()`.
    """
    q, k, v, segment_ids, positions, block_size, cache = args
    interpret = use_interpreter("gpu")
    if cache is not None:
        raise Unsupported("blocks from before the row are given; the kernel takes whole rows only")
    max_slots = PADDED_BLOCK_SIZES[-1]
    if block_size >= max_slots:
        raise Unsupported(
            f"a block has {block_size} tokens; with its landmark it must fit in a tile of {max_slots} keys"
        )
    require_head_dims(q.shape[3], v.shape[3])
    require_bfloat16(q=q, k=k, v=v)
    length = q.shape[1]
    slots = next(n for n in PADDED_BLOCK_SIZES if n > block_size)
    config = LandmarkKernelConfig(block_size, slots, q.shape[2] // k.shape[2], interpret)
    # The unused slots after the last landmark may lie after the row, so the row is padded by as many tokens.
    unused = slots - block_size - 1
    padding = -(length + unused) % (NUM_CONSUMER_WGS * CHUNK) + unused
    q, k, v = (pad_tokens(x, padding) for x in (q, k, v))
    visibility = compute_visibility(segment_ids, positions, config, length + padding)
    return _landmark_attention(config, q, k, v, visibility)[:, :length]
