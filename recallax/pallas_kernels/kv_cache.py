"""The key/value cache: a ring buffer that stores position p in slot p mod W.

A cache for full attention has a slot for every position. The filled slots follow from the number of tokens seen, so the
state needs no bookkeeping of its own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents, last_valid


class KVCache(NamedTuple):
    """Keys and values of the last W tokens of a document."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G V"]


def cached_positions(num_seen: Int[Array, " B"], slots: int) -> Int[Array, "B W"]:
    """Return the position stored in each slot after `num_seen` tokens of a document; negative for empty slots.

    Args:
        num_seen: Tokens of the document so far.
        slots: Number of slots W of the cache.
    """
    newest = num_seen[:, None] - 1
    return newest - (newest - jnp.arange(slots)[None]) % slots


def update_kv_cache(
    cache: KVCache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> KVCache:
    """Return the cache after T more tokens.

    It stores the row's last document, after the cached tokens if that is the cache's own document. Rows without valid
    tokens keep their cache. Empty slots are zero.

    Args:
        cache: The cache before these tokens.
        k: New keys.
        v: New values.
        positions: Positions within documents; the first one of a row is the number of tokens in its cache.
        segment_ids: Document ids; 0 is padding.
    """
    docs = index_documents(segment_ids)
    last = jnp.maximum(last_valid(docs), 0)[:, None]
    in_last_document = docs.index == jnp.take_along_axis(docs.index, last, axis=1)
    first = jnp.argmax(in_last_document & docs.valid, axis=1, keepdims=True)
    last_position = jnp.take_along_axis(positions, last, axis=1)
    first_position = jnp.take_along_axis(positions, first, axis=1)
    slot_positions = cached_positions(last_position[:, 0] + 1, cache.k.shape[1])
    source = jnp.clip(first + slot_positions - first_position, 0, k.shape[1] - 1)[..., None, None]
    from_new = (slot_positions >= first_position)[..., None, None]
    from_old = ((slot_positions >= 0) & (slot_positions < first_position))[..., None, None]
    empty_row = ~docs.valid.any(axis=1)[:, None, None, None]

    def merge(old: Array, new: Array) -> Array:
        gathered = jnp.take_along_axis(new, source, axis=1).astype(old.dtype)
        return jnp.where(empty_row, old, jnp.where(from_new, gathered, jnp.where(from_old, old, 0)))

    return KVCache(merge(cache.k, k), merge(cache.v, v))


def update_kv_cache_step(
    cache: KVCache,
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> KVCache:
    """Return the cache after one more token of each active row.

    If the caller donates the cache, only the token's slot is written.

    Args:
        cache: The cache before the token.
        k: Key of the token.
        v: Value of the token.
        position: Position of the token within its document.
        active: Rows that have a token; the others keep their cache.
    """
    slots = cache.k.shape[1]
    row = jnp.arange(position.shape[0])
    slot = jnp.where(active, position % slots, slots)  # inactive rows write out of range, which is dropped

    def put(old: Array, new: Array) -> Array:
        return old.at[row, slot].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    return KVCache(put(cache.k, k), put(cache.v, v))


class PersistentKV(NamedTuple):
    """Keys and values without a position that every query sees."""

    k: Float[Array, "P G K"]
    v: Float[Array, "P G V"]


def prepend_persistent(
    persistent: PersistentKV | None,
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B N G K"], Float[Array, "B N G V"], Bool[Array, "B T N"]]:
    """Concatenate the persistent keys and values before k and v, and extend the mask; N = P + S.

    Args:
        persistent: P keys and values that every query sees; None: the other arguments are returned.
        k: Keys.
        v: Values.
        visible: True where a query sees a key.

    Returns:
        Keys, values and mask with the persistent ones first.
    """
    if persistent is None:
        return k, v, visible

    def prepend(row: Array, x: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(row.astype(x.dtype), (x.shape[0], *row.shape)), x], axis=1)

    always_visible = jnp.ones((*visible.shape[:2], persistent.k.shape[0]), bool)
    mask = jnp.concatenate([always_visible, visible], axis=2)
    return prepend(persistent.k, k), prepend(persistent.v, v), mask
