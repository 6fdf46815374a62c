"""Softmax attention in XLA: all pairs at once, or block by block of queries so that memory is linear in time."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, join_time, single_document, split_time
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.kv_cache import KVCache, PersistentKV, cached_positions, prepend_persistent
from recallax.pallas_kernels.window_attention import reference

BLOCK = 256


class _CachedKV(NamedTuple):
    """Cached keys as the first document's queries meet them; `key_positions` is negative where a slot is empty."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G V"]
    key_positions: Int[Array, "B W"]
    query_positions: Int[Array, "B T"]  # of the queries


def dense(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds | None,
    window: int | None,
    persistent: PersistentKV | None,
    cache: KVCache | None,
    positions: Int[Array, "B T"] | None,
) -> Float[Array, "B T H V"]:
    """The definition over cached and new keys; q is scaled already."""
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    time = jnp.arange(q.shape[1])
    visible = _visibility_mask(document_ids, document_ids, time, time, window)
    joined = _concat_cached(_cached_kv(cache, positions), k, v, visible, document_ids, window)
    return reference.attend(q, *prepend_persistent(persistent, *joined))


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    document_ids: DocumentIds | None,
    window: int | None,
    persistent: PersistentKV | None,
    cache: KVCache | None,
    positions: Int[Array, "B T"] | None,
) -> Float[Array, "B T H V"]:
    """The same; a block of queries meets only the keys that its window reaches, and scores are never kept."""
    length, past = q.shape[1], _cached_kv(cache, positions)
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    if length <= BLOCK:
        time = jnp.arange(length)
        visible = _visibility_mask(document_ids, document_ids, time, time, window)
        return attend(q, *prepend_persistent(persistent, *_concat_cached(past, k, v, visible, document_ids, window)))
    reach = length if window is None else min(length, window - 1 + BLOCK)  # keys that one block may see

    @jax.checkpoint
    def block(part: tuple[Int[Array, ""], Array, DocumentIds, Array]) -> Array:
        start, q, docs_q, positions = part
        first = jnp.clip(start + BLOCK - reach, 0, length - reach)
        keys, values, docs_k = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, reach, axis=1), (k, v, document_ids)
        )
        visible = _visibility_mask(docs_q, docs_k, start + jnp.arange(BLOCK), first + jnp.arange(reach), window)
        here = None if past is None else past._replace(query_positions=positions)
        joined = _concat_cached(here, keys, values, visible, docs_q, window)
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
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (
        near & (document_ids_q.index[:, :, None] == document_ids_k.index[:, None, :]) & document_ids_k.valid[:, None, :]
    )


def _cached_kv(cache: KVCache | None, positions: Int[Array, "B T"] | None) -> _CachedKV | None:
    if cache is None or positions is None:
        return None
    # Padding stands on the right, so a row's first position is the number of tokens already in its cache.
    held = cached_positions(positions[:, 0], cache.k.shape[1])
    filled = (held >= 0)[..., None, None]  # an empty slot may hold anything, NaN included
    return _CachedKV(jnp.where(filled, cache.k, 0), jnp.where(filled, cache.v, 0), held, positions)


def _concat_cached(
    past: _CachedKV | None,
    k: Array,
    v: Array,
    visible: Bool[Array, "B T S"],
    document_ids: DocumentIds,
    window: int | None,
) -> tuple[Array, Array, Array]:
    """Keys, values and mask with the cached keys before the new ones; they belong to the row's first document."""
    if past is None:
        return k, v, visible
    old = (document_ids.index == 0)[:, :, None] & (past.key_positions >= 0)[:, None, :]
    if window is not None:
        old &= past.query_positions[:, :, None] - past.key_positions[:, None, :] < window
    k = jnp.concatenate([past.k.astype(k.dtype), k], axis=1)
    v = jnp.concatenate([past.v.astype(v.dtype), v], axis=1)
    return k, v, jnp.concatenate([old, visible], axis=2)


def attend(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G V"], visible: Bool[Array, "B T S"]
) -> Float[Array, "B T H V"]:
    """`reference.attend` with grouped heads kept together and products in the inputs' dtype; softmax in float32."""
    b, t, h, width = q.shape
    q = q.reshape(b, t, k.shape[2], -1, width)
    mask = visible[:, None, None]
    scores = jnp.where(mask, einsum_f32("btgrk,bsgk->bgrts", q, k), -1e30)  # finite: to see nothing must not make NaN
    weights = jnp.where(mask, jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))), 0)
    total = jnp.moveaxis(weights.sum(axis=-1), 3, 1)[..., None]
    out = einsum_f32("bgrts,bsgv->btgrv", weights.astype(v.dtype), v)
    return (out / jnp.where(total > 0, total, 1)).reshape(b, t, h, -1)


class VisibleKV(NamedTuple):
    """Keys and values that a token of each row sees where `visible`; one row of them serves all."""

    k: Float[Array, "b S G K"]
    v: Float[Array, "b S G V"]
    visible: Bool[Array, "b S"]


def attend_one_query(q: Float[Array, "B H K"], parts: Sequence[VisibleKV]) -> Float[Array, "B H V"]:
    """`attend` for one query per row, which sees something of one of the parts; in float32 or wider.

    By products and sums, each in one pass over a cache as it lies: a matrix product would first copy it, axes turned.
    """
    (b, h, width), wide = q.shape, accumulator_dtype(q.dtype)
    q = q.astype(wide).reshape(b, 1, parts[0].k.shape[2], -1, width)
    masks = [part.visible[..., None, None] for part in parts]
    scores = [jnp.sum(q * part.k[:, :, :, None].astype(wide), axis=-1) for part in parts]
    scores = [jnp.where(mask, score, -1e30) for mask, score in zip(masks, scores, strict=True)]
    most = jnp.stack([score.max(axis=1) for score in scores]).max(axis=0)[:, None]
    weights = [jnp.where(mask, jnp.exp(score - most), 0) for mask, score in zip(masks, scores, strict=True)]
    values = [  # what is not seen may hold anything, NaN included
        jnp.where(mask[..., None], weight[..., None] * part.v[:, :, :, None].astype(wide), 0)
        for part, mask, weight in zip(parts, masks, weights, strict=True)
    ]
    total = jnp.stack([weight.sum(axis=1) for weight in weights]).sum(axis=0)[..., None]
    out = jnp.stack([value.sum(axis=1) for value in values]).sum(axis=0)
    return (out / jnp.where(total > 0, total, 1)).reshape(b, h, -1)
