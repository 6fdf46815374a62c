"""Softmax attention in XLA: all pairs at once, or blocks of queries so that memory is linear in time."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, join_time, single_document, split_time
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.kv_cache import KVCache, cached_positions, prepend_persistent
from recallax.pallas_kernels.masked_logit import MASKED_LOGIT
from recallax.pallas_kernels.window_attention import reference
from recallax.pallas_kernels.window_attention.reference import WindowAttentionArgs

BLOCK = 256
"""Queries of a block."""


class _CachedKV(NamedTuple):
    """Cached keys and values of the row's first document, and the positions of keys and queries."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G V"]
    key_positions: Int[Array, "B W"]
    """Negative for empty slots."""
    query_positions: Int[Array, "B T"]


def dense(args: WindowAttentionArgs) -> Float[Array, "B T H V"]:
    """Apply the definition to cached and new keys."""
    q, k, v, document_ids, window, persistent, cache, positions = args
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    time = jnp.arange(q.shape[1])
    visible = _visibility_mask(document_ids, document_ids, time, time, window)
    joined = _concat_cached(_cached_kv(cache, positions), k, v, visible, document_ids, window)
    return reference.attend(q, *prepend_persistent(persistent, *joined))


def blockwise(args: WindowAttentionArgs) -> Float[Array, "B T H V"]:
    """Compute attention by blocks of queries, each against the keys within reach of its window.

    Scores are recomputed in the backward pass.

    The arguments and the result are those of `window_attention.xla.dense`.
    """
    q, k, v, document_ids, window, persistent, cache, positions = args
    length, past = q.shape[1], _cached_kv(cache, positions)
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    if length <= BLOCK:
        time = jnp.arange(length)
        visible = _visibility_mask(document_ids, document_ids, time, time, window)
        return attend(q, *prepend_persistent(persistent, *_concat_cached(past, k, v, visible, document_ids, window)))
    num_keys = length if window is None else min(length, window - 1 + BLOCK)  # keys within reach of one block

    @jax.checkpoint
    def block(part: tuple[Int[Array, ""], Array, DocumentIds, Array]) -> Array:
        start, q, docs_q, positions = part
        first = jnp.clip(start + BLOCK - num_keys, 0, length - num_keys)
        keys, values, docs_k = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, num_keys, axis=1), (k, v, document_ids)
        )
        visible = _visibility_mask(docs_q, docs_k, start + jnp.arange(BLOCK), first + jnp.arange(num_keys), window)
        block_past = None if past is None else past._replace(query_positions=positions)
        joined = _concat_cached(block_past, keys, values, visible, docs_q, window)
        return attend(q, *prepend_persistent(persistent, *joined))

    positions = document_ids.index if past is None else past.query_positions
    cut = jax.tree.map(lambda x: split_time(x, BLOCK), (q, document_ids, positions))
    return join_time(jax.lax.map(block, (jnp.arange(0, length, BLOCK), *cut)), length)


def _visibility_mask(
    document_ids_q: DocumentIds,
    document_ids_k: DocumentIds,
    time_q: Int[Array, " T"],
    time_k: Int[Array, " S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    distance = time_q[None, :, None] - time_k[None, None]
    in_window = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (
        in_window
        & (document_ids_q.index[:, :, None] == document_ids_k.index[:, None, :])
        & document_ids_k.valid[:, None, :]
    )


def _cached_kv(cache: KVCache | None, positions: Int[Array, "B T"] | None) -> _CachedKV | None:
    if cache is None or positions is None:
        return None
    # Padding is on the right, so a row's first position is the number of tokens in its cache.
    key_positions = cached_positions(positions[:, 0], cache.k.shape[1])
    filled = (key_positions >= 0)[..., None, None]  # empty slots may contain NaN
    return _CachedKV(jnp.where(filled, cache.k, 0), jnp.where(filled, cache.v, 0), key_positions, positions)


def _concat_cached(
    past: _CachedKV | None,
    k: Array,
    v: Array,
    visible: Bool[Array, "B T S"],
    document_ids: DocumentIds,
    window: int | None,
) -> tuple[Array, Array, Array]:
    """Concatenate the cached keys, which belong to the row's first document, before the new keys, values and mask."""
    if past is None:
        return k, v, visible
    cached_visible = (document_ids.index == 0)[:, :, None] & (past.key_positions >= 0)[:, None, :]
    if window is not None:
        cached_visible &= past.query_positions[:, :, None] - past.key_positions[:, None, :] < window
    k = jnp.concatenate([past.k.astype(k.dtype), k], axis=1)
    v = jnp.concatenate([past.v.astype(v.dtype), v], axis=1)
    return k, v, jnp.concatenate([cached_visible, visible], axis=2)


def attend(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G V"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B T H V"]:
    """Compute softmax attention with a mask; products are in the inputs' dtype and the softmax is float32.

    Args:
        q: Scaled queries; H heads share G key/value heads.
        k: Keys.
        v: Values.
        visible: True where a query sees a key.

    Returns:
        Float32 output; 0 where a query sees no key.
    """
    b, t, h, width = q.shape
    q = q.reshape(b, t, k.shape[2], -1, width)
    mask = visible[:, None, None]
    scores = jnp.where(mask, einsum_f32("btgrk,bsgk->bgrts", q, k), MASKED_LOGIT)
    weights = jnp.where(mask, jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))), 0)
    total = jnp.moveaxis(weights.sum(axis=-1), 3, 1)[..., None]
    out = einsum_f32("bgrts,bsgv->btgrv", weights.astype(v.dtype), v)
    return (out / jnp.where(total > 0, total, 1)).reshape(b, t, h, -1)


class VisibleKV(NamedTuple):
    """Keys and values of one source, for one query per row; b is B, or 1 if all rows share them."""

    k: Float[Array, "b S G K"]
    v: Float[Array, "b S G V"]
    visible: Bool[Array, "b S"]


def attend_one_query(q: Float[Array, "B H K"], parts: Sequence[VisibleKV]) -> Float[Array, "B H V"]:
    """Compute softmax attention of one query per row over several sources, in float32 or wider.

    It uses elementwise products and sums, which read each cache once in its own layout; a matrix product would first
    copy the cache to transpose it.

    Args:
        q: Scaled query of each row; it must see at least one key.
        parts: The sources.

    Returns:
        Output in float32, or float64 for float64 queries.
    """
    (b, h, width), dtype = q.shape, accumulator_dtype(q.dtype)
    q = q.astype(dtype).reshape(b, 1, parts[0].k.shape[2], -1, width)
    masks = [part.visible[..., None, None] for part in parts]
    scores = [jnp.sum(q * part.k[:, :, :, None].astype(dtype), axis=-1) for part in parts]
    scores = [jnp.where(mask, score, MASKED_LOGIT) for mask, score in zip(masks, scores, strict=True)]
    highest = jnp.stack([score.max(axis=1) for score in scores]).max(axis=0)[:, None]
    weights = [jnp.where(mask, jnp.exp(score - highest), 0) for mask, score in zip(masks, scores, strict=True)]
    values = [  # invisible values may be NaN
        jnp.where(mask[..., None], weight[..., None] * part.v[:, :, :, None].astype(dtype), 0)
        for part, mask, weight in zip(parts, masks, weights, strict=True)
    ]
    total = jnp.stack([weight.sum(axis=1) for weight in weights]).sum(axis=0)[..., None]
    out = jnp.stack([value.sum(axis=1) for value in values]).sum(axis=0)
    return (out / jnp.where(total > 0, total, 1)).reshape(b, h, -1)
