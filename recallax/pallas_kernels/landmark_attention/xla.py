"""Landmark attention in XLA: all pairs at once, or queries in chunks that go over the blocks with a running softmax.

A past block enters as one logit, its landmark's, whose value is the softmax average inside the block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import Documents, documents, join_time, one_document, split_time
from recallax.pallas_kernels.landmark_attention import reference
from recallax.pallas_kernels.landmark_attention.blocks import (
    Blocks,
    LandmarkCache,
    Near,
    complete_blocks,
    near,
    seen_from,
)
from recallax.pallas_kernels.product import product

CHUNK = 64
"""Queries at a time; a row of up to twice as many is taken whole."""
KEYS = 512
"""Tokens of past blocks at a time."""
UNSEEN = -(2**30)
"""Where the block of a slot begins that is no token's."""
NEVER = -1e30
"""A logit of what is not seen; finite, since to see nothing must not make NaN."""


def dense(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segments: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    real: int,
    past: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """The definition over cached and new keys; q is scaled already."""
    docs = documents_of(segments, positions)
    queries = reference.Tokens(docs.index, positions)
    keys = reference.Tokens(jnp.where(docs.valid, docs.index, -1), positions)
    if past is not None:
        old_k, old_v, old = _cached(past, positions[:, 0])
        k, v = (jnp.concatenate([a.astype(x.dtype), x], axis=1) for a, x in ((old_k, k), (old_v, v)))
        both = zip(old, keys, strict=True)
        keys = reference.Tokens(*(jnp.concatenate([a.astype(x.dtype), x], axis=1) for a, x in both))
    return reference.attend(q, k, v, queries, keys, real)


def _cached(past: LandmarkCache, seen: Int[Array, " B"]) -> tuple[Array, Array, reference.Tokens]:
    """What the cache holds as a sequence of tokens, landmarks with values of zero."""
    rows, count, real, groups, _ = past.k.shape

    def sequence(blocks: Array, mark: Array, own: Array) -> Array:
        whole = jnp.concatenate([blocks, mark[:, :, None]], axis=2)
        return jnp.concatenate([whole.reshape(rows, -1, groups, blocks.shape[-1]), own], axis=1)

    k = sequence(past.k, past.marks, past.own_k)
    v = sequence(past.v, jnp.zeros_like(past.v[:, :, 0]), past.own_v)
    size = real + 1
    unfinished = (seen // size * size)[:, None]
    blocks = jnp.broadcast_to(jnp.arange(count * size)[None], (rows, count * size))
    position = jnp.concatenate([blocks, unfinished + jnp.arange(real)[None]], axis=1)
    held = jnp.concatenate([blocks < unfinished, position[:, count * size :] < seen[:, None]], axis=1)
    k, v = (jnp.where(held[..., None, None], x, 0) for x in (k, v))  # an empty slot may hold anything, NaN included
    return k, v, reference.Tokens(jnp.where(held, 0, -1).astype(position.dtype), position)


def blockwise(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segments: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    real: int,
    past: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """The same in memory linear in time; scores are never kept."""
    rows, length, heads, width = q.shape
    docs = documents_of(segments, positions)
    blocks = complete_blocks(k, v, docs, positions, real, past)
    slots = near(k, v, docs, positions, real, past)
    parts = _in_parts(blocks, max(1, KEYS // real), length)
    chunk = length if length <= 2 * CHUNK else CHUNK
    begin = jnp.arange(length)[None] - positions % (real + 1)
    cut = [split_time(x, chunk) for x in (q.reshape(rows, length, k.shape[2], -1, width), docs.index, begin)]
    slots = padded(slots, -length % chunk)

    def one(part: tuple[Int[Array, ""], Array, Array, Array]) -> Array:
        start, q, document, begin = part
        running = _own(q, *own_slots(slots, begin, start, real))
        time = start + jnp.arange(chunk)

        def further(running: tuple[Array, Array, Array], part: Blocks) -> tuple[tuple[Array, Array, Array], None]:
            @jax.checkpoint  # or the scan would keep the scores of all parts
            def take(running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                return _past(q, part, seen_from(part, document, time), running)

            begun = jnp.min(part.time) < start + chunk
            return jax.lax.cond(begun, take, lambda running: running, running), None

        (_, total, out), _ = jax.lax.scan(further, running, parts)
        out = out / jnp.where(total > 0, total, 1)[..., None]
        return jnp.moveaxis(out, 3, 1).reshape(rows, chunk, heads, -1)

    if chunk == length:
        return one((jnp.zeros((), int), cut[0][0], cut[1][0], cut[2][0]))
    return join_time(jax.lax.map(jax.checkpoint(one), (jnp.arange(0, length, chunk), *cut)), length)


def documents_of(segments: Int[Array, "B T"] | None, positions: Int[Array, "B T"]) -> Documents:
    """The documents of each row; one per row without segments."""
    return one_document(*positions.shape) if segments is None else documents(segments)


def padded(slots: Near, end: int) -> Near:
    """With slots behind the row that nobody sees."""
    k, v = (jnp.pad(x, ((0, 0), (0, end), (0, 0), (0, 0))) for x in slots[:2])
    return Near(k, v, jnp.pad(slots.begin, ((0, 0), (0, end)), constant_values=UNSEEN))


def own_slots(
    slots: Near, begin: Int[Array, "B C"], start: Int[Array, ""], real: int
) -> tuple[Near, Bool[Array, "B C S"]]:
    """The slots that C queries from time `start` on may see, and which of them each does; `begin` as in `Near`."""
    chunk = begin.shape[1]
    part = Near(*(jax.lax.dynamic_slice_in_dim(x, start, chunk + real, axis=1) for x in slots))
    before = jnp.arange(chunk + real)[None] <= real + jnp.arange(chunk)[:, None]
    return part, before[None] & (part.begin[:, None] == begin[:, :, None])


def _in_parts(blocks: Blocks, size: int, length: int) -> Blocks:
    """[N, B, size, ...], the last part filled with blocks that do not exist."""
    size = min(size, blocks.time.shape[1])
    exists = split_time(jnp.ones_like(blocks.time), size).at[-1].set(0)
    left = -blocks.time.shape[1] % size
    exists = exists.at[-1, :, : size - left].set(1)
    parts = Blocks(*(split_time(x, size) for x in blocks))
    return parts._replace(time=jnp.where(exists > 0, parts.time, length))


def _own(
    q: Float[Array, "B C G R K"], slots: Near, visible: Bool[Array, "B C S"]
) -> tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]]:
    """Running maximum, sum and weighted values over the own block."""
    mask = visible[:, None, None]
    scores = jnp.where(mask, product("bcgrk,bsgk->bgrcs", q, slots.k), NEVER)
    most = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - most[..., None]), 0)
    return most, weights.sum(axis=-1), product("bgrcs,bsgv->bgrcv", weights.astype(slots.v.dtype), slots.v)


def _past(
    q: Float[Array, "B C G R K"],
    blocks: Blocks,
    visible: Bool[Array, "B C M"],
    running: tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]],
) -> tuple[Float[Array, "B G R C"], Float[Array, "B G R C"], Float[Array, "B G R C V"]]:
    """The same with these blocks besides."""
    most, total, out = running
    mask = visible[:, None, None]
    chosen = jnp.where(mask, product("bcgrk,bmgk->bgrcm", q, blocks.marks), NEVER)
    higher = jax.lax.stop_gradient(jnp.maximum(most, chosen.max(axis=-1)))
    shrink = jnp.exp(most - higher)
    chosen = jnp.where(mask, jnp.exp(chosen - higher[..., None]), 0)
    scores = product("bcgrk,bmlgk->bgrcml", q, blocks.k)
    inside = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = inside * (chosen / inside.sum(axis=-1))[..., None]
    added = product("bgrcml,bmlgv->bgrcv", weights.astype(blocks.v.dtype), blocks.v)
    return higher, total * shrink + chosen.sum(axis=-1), out * shrink[..., None] + added
