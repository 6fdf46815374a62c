"""Landmark attention that reads the top-k past blocks, which the landmarks select for each query.

`block_selection.py` defines which blocks a query reads and at which distances. Source: Mohtashami & Jaggi 2023 (arXiv
2305.16300), sections 3.2 and 3.3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import join_time, split_time
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.landmark_attention.block_selection import (
    BlockRetrieval,
    Rotate,
    SelectedBlocks,
    landmark_log_probs,
    pack_log_probs,
    rotate_to_true_positions,
    running_max,
    select_blocks,
    unpack_log_probs,
)
from recallax.pallas_kernels.landmark_attention.landmark_blocks import (
    LandmarkBlocks,
    LandmarkCache,
    complete_blocks,
    local_kv,
    visible_blocks,
)
from recallax.pallas_kernels.landmark_attention.xla import (
    MASKED_LOGIT,
    documents_or_single,
    pad_local_kv,
    slice_local_kv,
)

CHUNK = 16
"""Queries of a chunk; each query gathers its own blocks, which limits the chunk by memory."""


class GatheredBlocks(NamedTuple):
    """Selected blocks per query and head."""

    landmark_k: Float[Array, "B C H N K"]
    k: Float[Array, "B C H N L K"]
    v: Float[Array, "B C H N L V"]


def rotate_cache_to_true_positions(cache: LandmarkCache, num_seen: Int[Array, " B"], rotate: Rotate) -> LandmarkCache:
    """Apply the rotary embedding to cached keys at their exact positions; queries must be rotated the same way.

    Args:
        cache: The cache.
        num_seen: Number of tokens in the cache.
        rotate: Rotary embedding.
    """
    slots, block_size = cache.k.shape[1:3]
    size, rows = block_size + 1, num_seen.shape[0]
    block_index = jnp.broadcast_to(jnp.arange(slots)[None], (rows, slots))
    partial_k = rotate(
        cache.partial_k, jnp.broadcast_to((num_seen // size * size)[:, None, None], cache.partial_k.shape[:-1])
    )
    landmark_k, k = (rotate_to_true_positions(x, block_index, size, rotate) for x in (cache.landmark_k, cache.k))
    return LandmarkCache(landmark_k, k, cache.v, partial_k, cache.partial_v)


def gather_blocks(
    blocks: LandmarkBlocks | LandmarkCache, index: Int[Array, "B C X N"], num_heads: int
) -> GatheredBlocks:
    """Gather the selected blocks of each head's group; zeros for entries without a block.

    Args:
        blocks: All blocks.
        index: Indices of the selected blocks.
        num_heads: Number of query heads.
    """
    count, groups = blocks.landmark_k.shape[1:3]
    row = jnp.arange(index.shape[0])[:, None, None, None]
    group = (jnp.arange(num_heads) // (num_heads // groups))[None, None, :, None]
    clipped = jnp.minimum(index, count - 1)
    selected = jnp.broadcast_to(index < count, (*index.shape[:2], num_heads, index.shape[3]))[..., None]
    landmark_k = blocks.landmark_k[row, clipped, group]
    k, v = (x[row, clipped, :, group] for x in (blocks.k, blocks.v))
    return GatheredBlocks(jnp.where(selected, landmark_k, 0), *(jnp.where(selected[..., None], x, 0) for x in (k, v)))


def select_cached_blocks(
    q: Float[Array, "B C H K"],
    landmark_k: Float[Array, "B N G K"],
    block_index: Int[Array, "B N"],
    visible: Bool[Array, "B C N"],
    positions: Int[Array, "B C"],
    block_size: int,
    log_probs: Float[Array, "B H N"] | None,
    retrieval: BlockRetrieval,
    rotate: Rotate,
) -> tuple[SelectedBlocks, Float[Array, "B H N"] | None]:
    """Select the blocks of a cache that tokens of one block read.

    Args:
        q: Scaled queries of tokens of one block.
        landmark_k: Keys of the landmarks of the cache.
        block_index: Index of each block in its document.
        visible: True where the query may read the block.
        positions: Positions of the queries within documents.
        block_size: Tokens of a block besides its landmark.
        log_probs: Largest log-probabilities of the state; None: not tracked.
        retrieval: Number and selection of the blocks.
        rotate: Rotary embedding of queries and keys.

    Returns:
        The selected blocks, and the largest log-probabilities after these tokens.
    """
    landmark_k = jnp.where(visible.any(axis=1)[..., None, None], landmark_k, 0)
    ranking = landmark_log_probs(q, landmark_k, block_index, visible, positions, block_size, retrieval, rotate)
    if log_probs is not None:
        place = positions % (block_size + 1)
        ranking = running_max(unpack_log_probs(log_probs, positions[:, 0], block_size), ranking, place == 0)
        log_probs = pack_log_probs(ranking[:, -1])
    return select_blocks(ranking, block_index, positions, block_size, retrieval), log_probs


def attend_selected_blocks(
    q: Float[Array, "B C H K"],
    gathered: GatheredBlocks,
    selected: Bool[Array, "B C X N"],
    distance: Int[Array, "B C X N"],
    local_k: Float[Array, "B S G K"],
    local_v: Float[Array, "B S G V"],
    visible: Bool[Array, "B C S"],
    offset: Int[Array, "B C"],
    rotate: Rotate,
) -> Float[Array, "B C H V"]:
    """The grouped softmax over the chosen blocks and the own one, in float32; q is scaled already."""
    heads, count = gathered.landmark_k.shape[2:4]
    distance, selected = (jnp.broadcast_to(x, (*x.shape[:2], heads, count)) for x in (distance, selected))
    rotated = rotate(jnp.broadcast_to(q[:, :, :, None], (*q.shape[:3], count, q.shape[-1])), distance)
    logits = einsum_f32("bchnk,bchnk->bchn", rotated, gathered.landmark_k)
    scores = einsum_f32("bchnk,bchnlk->bchnl", rotated, gathered.k)
    inside = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    p, own = _joint_softmax(
        jnp.where(selected, logits, MASKED_LOGIT), _local_logits(q, local_k, visible, offset, rotate)
    )
    weights = inside * (jnp.where(selected, p, 0) / inside.sum(axis=-1))[..., None]
    far = einsum_f32("bchnl,bchnlv->bchv", weights.astype(gathered.v.dtype), gathered.v)
    return far + _local_values(own, local_v)


def attend_all_blocks(
    q: Float[Array, "B H K"], cache: LandmarkCache, position: Int[Array, " B"], rotate: Rotate
) -> Float[Array, "B H V"]:
    """Compute landmark attention of one token over all blocks of the cache, at exact distances.

    Args:
        q: Scaled query of each row.
        cache: Blocks of the document, which include the token.
        position: Position of the token within its document.
        rotate: Rotary embedding.
    """
    slots, real, groups = cache.k.shape[1:4]
    size, rows = real + 1, position.shape[0]
    number = jnp.arange(slots)[None]
    visible = number < position[:, None] // size
    landmark_k, k, v = (jnp.where(visible.reshape(rows, slots, *[1] * (x.ndim - 2)), x, 0) for x in cache[:3])
    distance = position[:, None] - number * size
    far = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], slots, q.shape[-1]))
    far = rotate(far, jnp.broadcast_to(distance[:, None], far.shape[:-1])).reshape(rows, groups, -1, slots, q.shape[-1])
    logits = einsum_f32("bgrmk,bmgk->bgrm", far, landmark_k)
    scores = einsum_f32("bgrmk,bmlgk->bgrml", far, k)
    inside = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    own_k, own_v, seen = partial_block(cache, position)
    own = _local_logits(q[:, None], own_k, seen[:, None], (position % size)[:, None], rotate)
    logits = jnp.where(visible[:, None, None], logits, MASKED_LOGIT).reshape(rows, 1, q.shape[1], slots)
    p, own = _joint_softmax(logits, own)
    p = jnp.where(visible[:, None, None], p.reshape(rows, groups, -1, slots), 0)
    weights = inside * (p / inside.sum(axis=-1))[..., None]
    out = einsum_f32("bgrml,bmlgv->bgrv", weights.astype(v.dtype), v).reshape(rows, q.shape[1], -1)
    return out + _local_values(own, own_v)[:, 0]


def partial_block(cache: LandmarkCache, position: Int[Array, " B"]) -> tuple[Array, Array, Bool[Array, "B L"]]:
    """Return the keys and values of the incomplete block up to this position, zeros after it, and the mask."""
    real = cache.partial_k.shape[1]
    seen = jnp.arange(real)[None] <= position[:, None] % (real + 1)
    k, v = (jnp.where(seen[..., None, None], x, 0) for x in (cache.partial_k, cache.partial_v))
    return k, v, seen


def retrieval_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: LandmarkCache,
    log_probs: Float[Array, "B H N"] | None,
    retrieval: BlockRetrieval,
    rotate: Rotate,
) -> tuple[Float[Array, "B T H V"], LandmarkBlocks, Float[Array, "B H M"] | None]:
    """Compute retrieval attention over whole rows.

    Args:
        q: Scaled queries.
        k: Keys, rotated by their offset in the block.
        v: Values.
        segment_ids: Document ids; 0 is padding.
        positions: Positions within documents.
        cache: Blocks of the row's first document before the row.
        log_probs: Largest log-probabilities of the cached blocks; None: not tracked.
        retrieval: Number and selection of the blocks.
        rotate: Rotary embedding of queries and keys.

    Returns:
        Output in float32, all complete blocks, and their largest log-probabilities.
    """
    length, heads = q.shape[1:3]
    real = cache.partial_k.shape[1]
    docs = documents_or_single(segment_ids, positions)
    blocks = complete_blocks(k, v, docs, positions, real, cache)
    chunk = min(CHUNK, length)
    place = positions % (real + 1)
    slots = pad_local_kv(local_kv(k, v, docs, positions, real, cache), -length % chunk)
    begin = jnp.arange(length)[None] - place
    if log_probs is not None:
        before = unpack_log_probs(log_probs, positions[:, 0], real)
        new = ((0, 0), (0, 0), (0, blocks.landmark_time.shape[1] - log_probs.shape[2]))
        log_probs = jnp.pad(before, new, constant_values=MASKED_LOGIT)

    def one(best: Array | None, part: tuple[Array, ...]) -> tuple[Array | None, Array]:
        start, q, document, valid, positions, begin = part
        time, place = start + jnp.arange(chunk), positions % (real + 1)
        valid &= (time < length)[None]  # the last chunk is padded with the last token of the row
        visible = visible_blocks(blocks, document, time) & valid[..., None]
        keys, numbers = blocks.landmark_k, blocks.block_index
        ranking = landmark_log_probs(q, keys, numbers, visible, positions, real, retrieval, rotate)
        if best is not None:
            ranking = running_max(best, ranking, valid & (place == 0))
            best = ranking[:, -1]
        chosen = select_blocks(ranking, blocks.block_index, positions, real, retrieval)
        own, seen = slice_local_kv(slots, begin, start, real)
        selected = chosen.index < blocks.landmark_time.shape[1]
        gathered = gather_blocks(blocks, chosen.index, heads)
        return best, attend_selected_blocks(q, gathered, selected, chosen.distance, own.k, own.v, seen, place, rotate)

    starts = jnp.arange(0, length, chunk)
    cut = (split_time(x, chunk) for x in (q, docs.index, docs.valid, positions, begin))
    log_probs, out = jax.lax.scan(one, log_probs, (starts, *cut))
    return join_time(out, length), blocks, None if log_probs is None else pack_log_probs(log_probs)


def retrieval_attention_step(
    q: Float[Array, "B H K"],
    cache: LandmarkCache,
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
    log_probs: Float[Array, "B H N"] | None,
    retrieval: BlockRetrieval,
    rotate: Rotate,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H N"] | None]:
    """Compute one token of `retrieval_attention`.

    Args:
        q: Scaled query of each row.
        cache: Blocks of the document; the incomplete block includes the token unless it is a landmark.
        position: Position of the token within its document.
        active: Rows that have a token.
        log_probs: Largest log-probabilities of the blocks; None: not tracked.
        retrieval: Number and selection of the blocks.
        rotate: Rotary embedding of queries and keys.

    Returns:
        Output in float32, and the largest log-probabilities after the token.
    """
    count, real, heads = cache.landmark_k.shape[1], cache.partial_k.shape[1], q.shape[1]
    number = jnp.broadcast_to(jnp.arange(count)[None], (position.shape[0], count))
    visible = number < position[:, None] // (real + 1)
    at, place = position[:, None], position[:, None] % (real + 1)
    chosen, after = select_cached_blocks(
        q[:, None], cache.landmark_k, number, visible[:, None], at, real, log_probs, retrieval, rotate
    )
    if log_probs is not None and after is not None:
        log_probs = jnp.where(active[:, None, None], after, log_probs)
    own_k, own_v, seen = partial_block(cache, position)
    selected = chosen.index < count
    gathered = gather_blocks(cache, chosen.index, heads)
    return attend_selected_blocks(
        q[:, None], gathered, selected, chosen.distance, own_k, own_v, seen[:, None], place, rotate
    )[:, 0], log_probs


def _local_logits(
    q: Float[Array, "B C H K"],
    k: Float[Array, "B S G K"],
    visible: Bool[Array, "B C S"],
    offset: Int[Array, "B C"],
    rotate: Rotate,
) -> Float[Array, "B C H S"]:
    rotated = rotate(q, jnp.broadcast_to(offset[:, :, None], q.shape[:-1]))
    rotated = rotated.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = einsum_f32("bcgrk,bsgk->bcgrs", rotated, k).reshape(*q.shape[:3], -1)
    return jnp.where(visible[:, :, None], logits, MASKED_LOGIT)


def _joint_softmax(
    block_logits: Float[Array, "B C H N"], local_logits: Float[Array, "B C H S"]
) -> tuple[Float[Array, "B C H N"], Float[Array, "B C H S"]]:
    """Return the softmax over the blocks and the local tokens together; 0 for masked logits."""
    logits = jnp.concatenate([block_logits, local_logits], axis=-1)
    p = jnp.where(logits > MASKED_LOGIT / 2, jax.nn.softmax(logits, axis=-1), 0)
    return p[..., : block_logits.shape[-1]], p[..., block_logits.shape[-1] :]


def _local_values(p: Float[Array, "B C H S"], v: Float[Array, "B S G V"]) -> Float[Array, "B C H V"]:
    rows, chunk, heads, slots = p.shape
    grouped = p.reshape(rows, chunk, v.shape[2], -1, slots).astype(v.dtype)
    return einsum_f32("bcgrs,bsgv->bcgrv", grouped, v).reshape(rows, chunk, heads, -1)
