"""The key/value cache: a ring buffer in which position p stands in slot p mod W.

Full attention has a slot for every position. Which slots are filled follows from the number of tokens seen, so the
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
    """The position that each slot holds after `num_seen` tokens of a document; negative where it is empty."""
    newest = num_seen[:, None] - 1
    return newest - (newest - jnp.arange(slots)[None]) % slots


def update_kv_cache(
    cache: KVCache,
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> KVCache:
    """The cache after T further tokens: it holds the row's last document, continued if that is the cache's own.

    Rows without any token keep their cache. Empty slots are zero.
    """
    docs = index_documents(segment_ids)
    last = jnp.maximum(last_valid(docs), 0)[:, None]
    final = docs.index == jnp.take_along_axis(docs.index, last, axis=1)
    first = jnp.argmax(final & docs.valid, axis=1, keepdims=True)
    newest = jnp.take_along_axis(positions, last, axis=1)
    begin = jnp.take_along_axis(positions, first, axis=1)
    held = cached_positions(newest[:, 0] + 1, cache.k.shape[1])
    source = jnp.clip(first + held - begin, 0, k.shape[1] - 1)[..., None, None]
    from_new = (held >= begin)[..., None, None]
    from_old = ((held >= 0) & (held < begin))[..., None, None]
    empty_row = ~docs.valid.any(axis=1)[:, None, None, None]

    def merge(old: Array, new: Array) -> Array:
        taken = jnp.take_along_axis(new, source, axis=1).astype(old.dtype)
        return jnp.where(empty_row, old, jnp.where(from_new, taken, jnp.where(from_old, old, 0)))

    return KVCache(merge(cache.k, k), merge(cache.v, v))


def update_kv_cache_step(
    cache: KVCache,
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> KVCache:
    """The cache after one further token of each active row; a loop that gives its cache away writes only that token."""
    slots = cache.k.shape[1]
    row = jnp.arange(position.shape[0])
    slot = jnp.where(active, position % slots, slots)  # an inactive row's lies outside

    def put(old: Array, new: Array) -> Array:
        return old.at[row, slot].set(new.astype(old.dtype), mode="drop", unique_indices=True)

    return KVCache(put(cache.k, k), put(cache.v, v))


class PersistentKV(NamedTuple):
    """Keys and values that belong to no position and that every query sees."""

    k: Float[Array, "P G K"]
    v: Float[Array, "P G V"]


def prepend_persistent(
    persistent: PersistentKV | None,
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B N G K"], Float[Array, "B N G V"], Bool[Array, "B T N"]]:
    """Keys, values and mask with the persistent ones in front."""
    if persistent is None:
        return k, v, visible
    count = persistent.k.shape[0]

    def joined(always: Array, x: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(always.astype(x.dtype), (x.shape[0], *always.shape)), x], axis=1)

    seen = jnp.ones((*visible.shape[:2], count), bool)
    return joined(persistent.k, k), joined(persistent.v, v), jnp.concatenate([seen, visible], axis=2)
