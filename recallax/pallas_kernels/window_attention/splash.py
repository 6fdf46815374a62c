"""Softmax attention on TPUs by splash attention, JAX's own kernel, which skips blocks that the mask rules out."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.kv_cache import KVCache, PersistentKV

LANES = 128
MAX_BLOCK = 512
"""Longest block of queries and of keys."""


def window_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds | None,
    window: int | None,
    persistent: PersistentKV | None,
    cache: KVCache | None,
    positions: Int[Array, "B T"] | None,
) -> Float[Array, "B T H V"]:
    """Whole rows, packed or not; q is scaled already. Widths and time are padded with zeros to multiples of 128."""
    interpret = use_interpreter("tpu")
    if persistent is not None:
        raise Unsupported("persistent keys are given, which no window leaves out")
    if cache is not None:
        raise Unsupported("a state is given; splash attention takes whole rows only")
    b, t, heads, _ = q.shape
    groups, values = k.shape[2], v.shape[-1]
    width = max(LANES * -(-x.shape[-1] // LANES) for x in (q, v))
    whole = LANES * -(-t // LANES)
    block = max(size for size in (LANES, 2 * LANES, MAX_BLOCK) if whole % size == 0)

    def heads_first(x: Array) -> Array:
        """[B, G, heads of the group, time, width]"""
        x = jnp.pad(x, ((0, 0), (0, whole - t), (0, 0), (0, width - x.shape[-1])))
        return jnp.moveaxis(x, 1, 2).reshape(b, groups, -1, whole, width)

    mask = masks.CausalMask((whole, whole))
    if window is not None:
        mask = masks.LocalMask((whole, whole), (window - 1, 0), 0)
    attend = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (heads // groups)), block_sizes=_block_sizes(block), interpret=interpret
    )
    ids = None
    if document_ids is not None:
        row = jnp.pad(jnp.where(document_ids.valid, document_ids.index + 1, 0), ((0, 0), (0, whole - t))).astype(
            jnp.int32
        )
        ids = splash.SegmentIds(row, row)
    per_group = jax.vmap(cast(Callable[..., Array], attend), in_axes=(0, 0, 0, None))
    per_row = jax.vmap(per_group, in_axes=(0, 0, 0, None if ids is None else 0))
    out = per_row(heads_first(q), heads_first(k)[:, :, 0], heads_first(v)[:, :, 0], ids)
    return jnp.moveaxis(out.reshape(b, heads, whole, width), 2, 1)[:, :t, :, :values]


def _block_sizes(size: int) -> splash.BlockSizes:
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.BlockSizes(**dict.fromkeys(names, size))
