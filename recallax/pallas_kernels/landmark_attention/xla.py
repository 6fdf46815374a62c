"""Landmark attention in XLA: all pairs at once, or chunks of queries with a running softmax over the blocks.

A past block enters as one logit, that of its landmark, whose value is the softmax average within the block.
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
from recallax.pallas_kernels.landmark_attention.reference import LandmarkAttentionArgs
from recallax.pallas_kernels.masked_logit import MASKED_LOGIT

CHUNK = 64
"""Queries of a chunk; a row of at most 2 * CHUNK tokens is one chunk."""
KEY_CHUNK = 512
"""Approximate number of tokens in a part of the past blocks."""
NO_BLOCK = -(2**30)
"""`LocalKV.block_start` of slots without a token."""


def dense(args: LandmarkAttentionArgs) -> Float[Array, "B T H V"]:
    """Apply the definition to cached and new keys."""
    q, k, v, segment_ids, positions, block_size, cache = args
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
    """Return the cache as a sequence of tokens; values of landmarks are 0."""
    rows, count, block_size, groups, _ = cache.k.shape

    def sequence(blocks: Array, landmark: Array, partial: Array) -> Array:
        complete = jnp.concatenate([blocks, landmark[:, :, None]], axis=2)
        return jnp.concatenate([complete.reshape(rows, -1, groups, blocks.shape[-1]), partial], axis=1)

    k = sequence(cache.k, cache.landmark_k, cache.partial_k)
    v = sequence(cache.v, jnp.zeros_like(cache.v[:, :, 0]), cache.partial_v)
    size = block_size + 1
    partial_start = (num_seen // size * size)[:, None]
    blocks = jnp.broadcast_to(jnp.arange(count * size)[None], (rows, count * size))
    position = jnp.concatenate([blocks, partial_start + jnp.arange(block_size)[None]], axis=1)
    filled = jnp.concatenate([blocks < partial_start, position[:, count * size :] < num_seen[:, None]], axis=1)
    k, v = (jnp.where(filled[..., None, None], x, 0) for x in (k, v))  # empty slots may contain NaN
    return k, v, reference.TokenPositions(jnp.where(filled, 0, -1).astype(position.dtype), position)


def blockwise(args: LandmarkAttentionArgs) -> Float[Array, "B T H V"]:
    """Compute landmark attention in memory linear in time; scores are recomputed in the backward pass.

    The arguments and the result are those of `landmark_attention.xla.dense`.
    """
    q, k, v, segment_ids, positions, block_size, cache = args
    rows, length, heads, width = q.shape
    docs = documents_or_single(segment_ids, positions)
    blocks = complete_blocks(k, v, docs, positions, block_size, cache)
    slots = local_kv(k, v, docs, positions, block_size, cache)
    parts = _split_blocks(blocks, max(1, KEY_CHUNK // block_size), length)
    chunk = length if length <= 2 * CHUNK else CHUNK
    block_start = jnp.arange(length)[None] - positions % (block_size + 1)
    cut = [split_time(x, chunk) for x in (q.reshape(rows, length, k.shape[2], -1, width), docs.index, block_start)]
    slots = pad_local_kv(slots, -length % chunk)

    def attend_chunk(part: tuple[Int[Array, ""], Array, Array, Array]) -> Array:
        start, q, document, block_start = part
        running = _attend_local(q, *slice_local_kv(slots, block_start, start, block_size))
        time = start + jnp.arange(chunk)

        def add_blocks(
            running: tuple[Array, Array, Array], part: LandmarkBlocks
        ) -> tuple[tuple[Array, Array, Array], None]:
            @jax.checkpoint  # otherwise the scan would save the scores of all parts
            def attend_part(running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                return _attend_past_blocks(q, part, visible_blocks(part, document, time), running)

            any_visible = jnp.min(part.landmark_time) < start + chunk
            return jax.lax.cond(any_visible, attend_part, lambda running: running, running), None

        (_, total, out), _ = jax.lax.scan(add_blocks, running, parts)
        out = out / jnp.where(total > 0, total, 1)[..., None]
        return jnp.moveaxis(out, 3, 1).reshape(rows, chunk, heads, -1)

    if chunk == length:
        return attend_chunk((jnp.zeros((), int), cut[0][0], cut[1][0], cut[2][0]))
    return join_time(jax.lax.map(jax.checkpoint(attend_chunk), (jnp.arange(0, length, chunk), *cut)), length)


def documents_or_single(segment_ids: Int[Array, "B T"] | None, positions: Int[Array, "B T"]) -> DocumentIds:
    """Return the documents of each row; one document per row without segment ids."""
    return single_document(*positions.shape) if segment_ids is None else index_documents(segment_ids)


def pad_local_kv(slots: LocalKV, end: int) -> LocalKV:
    """Append `end` slots that no query sees."""
    k, v = (jnp.pad(x, ((0, 0), (0, end), (0, 0), (0, 0))) for x in slots[:2])
    return LocalKV(k, v, jnp.pad(slots.block_start, ((0, 0), (0, end)), constant_values=NO_BLOCK))


def slice_local_kv(
    slots: LocalKV, block_start: Int[Array, "B C"], start: Int[Array, ""], block_size: int
) -> tuple[LocalKV, Bool[Array, "B C S"]]:
    """Return the slots that C queries may see, and the mask of the slots that each query sees.

    Args:
        slots: Slots of the row.
        block_start: Time at which each query's block starts, as in `LocalKV`.
        start: Time of the first query.
        block_size: Tokens of a block besides its landmark.
    """
    chunk = block_start.shape[1]
    part = LocalKV(*(jax.lax.dynamic_slice_in_dim(x, start, chunk + block_size, axis=1) for x in slots))
    causal = jnp.arange(chunk + block_size)[None] <= block_size + jnp.arange(chunk)[:, None]
    return part, causal[None] & (part.block_start[:, None] == block_start[:, :, None])


def _split_blocks(blocks: LandmarkBlocks, size: int, length: int) -> LandmarkBlocks:
    """Split the blocks into parts [N, B, size, ...]; the last part is padded with blocks that no query sees."""
    size = min(size, blocks.landmark_time.shape[1])
    exists = split_time(jnp.ones_like(blocks.landmark_time), size).at[-1].set(0)
    padding = -blocks.landmark_time.shape[1] % size
    exists = exists.at[-1, :, : size - padding].set(1)
    parts = LandmarkBlocks(*(split_time(x, size) for x in blocks))
    return parts._replace(landmark_time=jnp.where(exists > 0, parts.landmark_time, length))


def _attend_local(
    q: Float[Array, "B C G R K"], slots: LocalKV, visible: Bool[Array, "B C S"]
) -> tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]]:
    """Return the running maximum, sum and weighted values over each query's own block."""
    mask = visible[:, None, None]
    scores = jnp.where(mask, einsum_f32("bcgrk,bsgk->bgrcs", q, slots.k), MASKED_LOGIT)
    highest = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0)
    return highest, weights.sum(axis=-1), einsum_f32("bgrcs,bsgv->bgrcv", weights.astype(slots.v.dtype), slots.v)


def _attend_past_blocks(
    q: Float[Array, "B C G R K"],
    blocks: LandmarkBlocks,
    visible: Bool[Array, "B C M"],
    running: tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]],
) -> tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]]:
    """Update the running maximum, sum and weighted values with past blocks."""
    highest, total, out = running
    mask = visible[:, None, None]
    logits = jnp.where(mask, einsum_f32("bcgrk,bmgk->bgrcm", q, blocks.landmark_k), MASKED_LOGIT)
    new_highest = jax.lax.stop_gradient(jnp.maximum(highest, logits.max(axis=-1)))
    rescale = jnp.exp(highest - new_highest)
    gates = jnp.where(mask, jnp.exp(logits - new_highest[..., None]), 0)
    scores = einsum_f32("bcgrk,bmlgk->bgrcml", q, blocks.k)
    inside = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = inside * (gates / inside.sum(axis=-1))[..., None]
    added = einsum_f32("bgrcml,bmlgv->bgrcv", weights.astype(blocks.v.dtype), blocks.v)
    return new_highest, total * rescale + gates.sum(axis=-1), out * rescale[..., None] + added
