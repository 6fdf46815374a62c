"""Softmax attention on TPUs by splash attention, a kernel of JAX that skips fully masked blocks."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import to_segment_ids
from recallax.pallas_kernels.dispatch import Unsupported, interpreting, require_platform
from recallax.pallas_kernels.window_attention.reference import WindowAttentionArgs

LANES = 128
"""Lanes of a vector register; widths and lengths are padded to multiples of it."""
MAX_BLOCK = 512
"""Upper bound of the block of queries and of keys."""


def window_attention(args: WindowAttentionArgs) -> Float[Array, "B T H V"]:
    """Compute attention over whole rows; widths and time are padded with zeros to multiples of 128.

    The arguments and the result are those of `window_attention.xla.dense`.

    Raises:
        Unsupported: There is no TPU, or persistent keys or a cache are given.
    """
    q, k, v, document_ids, window, persistent, cache, _ = args
    require_platform("tpu")
    if persistent is not None:
        raise Unsupported("persistent keys are given, which a window cannot express")
    if cache is not None:
        raise Unsupported("a state is given; splash attention supports whole rows only")
    b, t, heads, _ = q.shape
    groups, values = k.shape[2], v.shape[-1]
    width = max(LANES * -(-x.shape[-1] // LANES) for x in (q, v))
    padded_length = LANES * -(-t // LANES)
    block = max(size for size in (LANES, 2 * LANES, MAX_BLOCK) if padded_length % size == 0)

    def heads_first(x: Array) -> Array:
        """Pad and transpose to [B, G, heads per group, time, width]."""
        x = jnp.pad(x, ((0, 0), (0, padded_length - t), (0, 0), (0, width - x.shape[-1])))
        return jnp.moveaxis(x, 1, 2).reshape(b, groups, -1, padded_length, width)

    mask = masks.CausalMask((padded_length, padded_length))
    if window is not None:
        mask = masks.LocalMask((padded_length, padded_length), (window - 1, 0), 0)
    attend = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (heads // groups)), block_sizes=_block_sizes(block), interpret=interpreting()
    )
    ids = None
    if document_ids is not None:
        row = jnp.pad(to_segment_ids(document_ids), ((0, 0), (0, padded_length - t))).astype(jnp.int32)
        ids = splash.SegmentIds(row, row)
    per_group = jax.vmap(cast(Callable[..., Array], attend), in_axes=(0, 0, 0, None))
    per_row = jax.vmap(per_group, in_axes=(0, 0, 0, None if ids is None else 0))
    out = per_row(heads_first(q), heads_first(k)[:, :, 0], heads_first(v)[:, :, 0], ids)
    return jnp.moveaxis(out.reshape(b, heads, padded_length, width), 2, 1)[:, :t, :, :values]


def _block_sizes(size: int) -> splash.BlockSizes:
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.BlockSizes(**dict.fromkeys(names, size))
