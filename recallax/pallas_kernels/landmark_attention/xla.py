"""Landmark attention in XLA: all pairs at once, or queries in chunks that go over the blocks with a running softmax.

A past block enters as one logit, its landmark's, whose value is the softmax average inside the block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, index_documents, join_time, single_document, split_time
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.landmark_attention import reference
from recallax.pallas_kernels.landmark_attention.landmark_blocks import (
    LandmarkBlocks,
    LandmarkCache,
    LocalKV,
    complete_blocks,
    local_kv,
    visible_blocks,
)

CHUNK = 64
"""Queries at a time; a row of up to twice as many is taken whole."""
KEY_CHUNK = 512
"""Tokens of past blocks at a time."""
NO_BLOCK = -(2**30)
"""Where the block of a slot begins that is no token's."""
MASKED_LOGIT = -1e30
"""A logit of what is not seen; finite, since to see nothing must not make NaN."""


def dense(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """The definition over cached and new keys; q is scaled already."""
    docs = documents_or_single(segment_ids, positions)
    queries = reference.TokenPositions(docs.index, positions)
    keys = reference.TokenPositions(jnp.where(docs.valid, docs.index, -1), positions)
    if cache is not None:
        old_k, old_v, old = _cached_tokens(cache, positions[:, 0])
        k, v = (jnp.concatenate([a.astype(x.dtype), x], axis=1) for a, x in ((old_k, k), (old_v, v)))
        both = zip(old, keys, strict=True)
        keys = reference.TokenPositions(*(jnp.concatenate([a.astype(x.dtype), x], axis=1) for a, x in both))
    return reference.attend(q, k, v, queries, keys, block_size)


def _cached_tokens(cache: LandmarkCache, num_seen: Int[Array, " B"]) -> tuple[Array, Array, reference.TokenPositions]:
    """What the cache holds as a sequence of tokens, landmarks with values of zero."""
    rows, count, real, groups, _ = cache.k.shape

    def sequence(blocks: Array, mark: Array, own: Array) -> Array:
        whole = jnp.concatenate([blocks, mark[:, :, None]], axis=2)
        return jnp.concatenate([whole.reshape(rows, -1, groups, blocks.shape[-1]), own], axis=1)

    k = sequence(cache.k, cache.landmark_k, cache.partial_k)
    v = sequence(cache.v, jnp.zeros_like(cache.v[:, :, 0]), cache.partial_v)
    size = real + 1
    unfinished = (num_seen // size * size)[:, None]
    blocks = jnp.broadcast_to(jnp.arange(count * size)[None], (rows, count * size))
    position = jnp.concatenate([blocks, unfinished + jnp.arange(real)[None]], axis=1)
    held = jnp.concatenate([blocks < unfinished, position[:, count * size :] < num_seen[:, None]], axis=1)
    k, v = (jnp.where(held[..., None, None], x, 0) for x in (k, v))  # an empty slot may hold anything, NaN included
    return k, v, reference.TokenPositions(jnp.where(held, 0, -1).astype(position.dtype), position)


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """The same in memory linear in time; scores are never kept."""
    rows, length, heads, width = q.shape
    docs = documents_or_single(segment_ids, positions)
    blocks = complete_blocks(k, v, docs, positions, block_size, cache)
    slots = local_kv(k, v, docs, positions, block_size, cache)
    parts = _split_blocks(blocks, max(1, KEY_CHUNK // block_size), length)
    chunk = length if length <= 2 * CHUNK else CHUNK
    begin = jnp.arange(length)[None] - positions % (block_size + 1)
    cut = [split_time(x, chunk) for x in (q.reshape(rows, length, k.shape[2], -1, width), docs.index, begin)]
    slots = pad_local_kv(slots, -length % chunk)

    def one(part: tuple[Int[Array, ""], Array, Array, Array]) -> Array:
        start, q, document, begin = part
        running = _attend_local(q, *slice_local_kv(slots, begin, start, block_size))
        time = start + jnp.arange(chunk)

        def further(
            running: tuple[Array, Array, Array], part: LandmarkBlocks
        ) -> tuple[tuple[Array, Array, Array], None]:
            @jax.checkpoint  # or the scan would keep the scores of all parts
            def take(running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                return _attend_past_blocks(q, part, visible_blocks(part, document, time), running)

            begun = jnp.min(part.landmark_time) < start + chunk
            return jax.lax.cond(begun, take, lambda running: running, running), None

        (_, total, out), _ = jax.lax.scan(further, running, parts)
        out = out / jnp.where(total > 0, total, 1)[..., None]
        return jnp.moveaxis(out, 3, 1).reshape(rows, chunk, heads, -1)

    if chunk == length:
        return one((jnp.zeros((), int), cut[0][0], cut[1][0], cut[2][0]))
    return join_time(jax.lax.map(jax.checkpoint(one), (jnp.arange(0, length, chunk), *cut)), length)


def documents_or_single(segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"]) -> DocumentIds:
    """The documents of each row; one per row without segments."""
    return single_document(*positions.shape) if segment_ids is None else index_documents(segment_ids)


def pad_local_kv(slots: LocalKV, end: int) -> LocalKV:
    """With slots behind the row that nobody sees."""
    k, v = (jnp.pad(x, ((0, 0), (0, end), (0, 0), (0, 0))) for x in slots[:2])
    return LocalKV(k, v, jnp.pad(slots.block_start, ((0, 0), (0, end)), constant_values=NO_BLOCK))


def slice_local_kv(
    slots: LocalKV, block_start: Int[Array, "B C"], start: Int[Array, ""], block_size: int
) -> tuple[LocalKV, Bool[Array, "B C S"]]:
    """The slots that C queries from time `start` on may see, and which of them each does; `block_start` as in `LocalKV`."""
    chunk = block_start.shape[1]
    part = LocalKV(*(jax.lax.dynamic_slice_in_dim(x, start, chunk + block_size, axis=1) for x in slots))
    before = jnp.arange(chunk + block_size)[None] <= block_size + jnp.arange(chunk)[:, None]
    return part, before[None] & (part.block_start[:, None] == block_start[:, :, None])


def _split_blocks(blocks: LandmarkBlocks, size: int, length: int) -> LandmarkBlocks:
    """[N, B, size, ...], the last part filled with blocks that do not exist."""
    size = min(size, blocks.landmark_time.shape[1])
    exists = split_time(jnp.ones_like(blocks.landmark_time), size).at[-1].set(0)
    left = -blocks.landmark_time.shape[1] % size
    exists = exists.at[-1, :, : size - left].set(1)
    parts = LandmarkBlocks(*(split_time(x, size) for x in blocks))
    return parts._replace(landmark_time=jnp.where(exists > 0, parts.landmark_time, length))


def _attend_local(
    q: Float[Array, "B C G R K"], slots: LocalKV, visible: Bool[Array, "B C S"]
) -> tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]]:
    """Running maximum, sum and weighted values over the own block."""
    mask = visible[:, None, None]
    scores = jnp.where(mask, einsum_f32("bcgrk,bsgk->bgrcs", q, slots.k), MASKED_LOGIT)
    most = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - most[..., None]), 0)
    return most, weights.sum(axis=-1), einsum_f32("bgrcs,bsgv->bgrcv", weights.astype(slots.v.dtype), slots.v)


def _attend_past_blocks(
    q: Float[Array, "B C G R K"],
    blocks: LandmarkBlocks,
    visible: Bool[Array, "B C M"],
    running: tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]],
) -> tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]]:
    """The same with these blocks besides."""
    most, total, out = running
    mask = visible[:, None, None]
    chosen = jnp.where(mask, einsum_f32("bcgrk,bmgk->bgrcm", q, blocks.landmark_k), MASKED_LOGIT)
    higher = jax.lax.stop_gradient(jnp.maximum(most, chosen.max(axis=-1)))
    shrink = jnp.exp(most - higher)
    chosen = jnp.where(mask, jnp.exp(chosen - higher[..., None]), 0)
    scores = einsum_f32("bcgrk,bmlgk->bgrcml", q, blocks.k)
    inside = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = inside * (chosen / inside.sum(axis=-1))[..., None]
    added = einsum_f32("bgrcml,bmlgv->bgrcv", weights.astype(blocks.v.dtype), blocks.v)
    return higher, total * shrink + chosen.sum(axis=-1), out * shrink[..., None] + added
