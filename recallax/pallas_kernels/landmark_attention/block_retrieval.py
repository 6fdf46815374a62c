"""Landmark attention that reads the top-k of the past blocks: landmarks choose them, query by query.

Keys carry their place in the block only, and a query is turned by its distance to a block's first token. Distances are
true, or stingy: the last k blocks are as far away as they are and all older ones stand k + 1 blocks back, so that no
distance exceeds k + 2 blocks. The chosen blocks are then put in order into k + 1 places: those among the last k to the
right, older ones to the left.

Blocks are chosen per head and token, per token (a probability is the largest over the heads), or per head (the largest
over the tokens of the query's block so far; the published one takes all tokens of a chunk, later ones included).
Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), sections 3.2 and 3.3; the threshold is that of its appendix D.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import join_time, split_time
from recallax.pallas_kernels.einsum_f32 import einsum_f32
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
"""Queries at a time, each of which gathers blocks of its own."""

type SelectionScope = Literal["head_and_token", "head", "token"]
type PositionMode = Literal["compressed", "exact"]
type Rotate = Callable[[Float[Array, "... K"], Int[Array, "..."]], Float[Array, "... K"]]
"""Rotates queries by a distance, and keys by a place."""


@dataclass(frozen=True, kw_only=True)
class BlockRetrieval:
    """How many blocks are read, who chooses them, and how far away they seem to be."""

    top_k: int
    selection_scope: SelectionScope = "head_and_token"
    position_mode: PositionMode = "compressed"
    min_probability: float = 0.0
    """Of a landmark among all earlier ones; what lies below is not read."""


class SelectedBlocks(NamedTuple):
    """Blocks to read, in the order of time; X is H, or 1 where all heads read the same."""

    index: Int[Array, "B C X N"]
    """Among the blocks there are; their number where nothing was chosen."""
    distance: Int[Array, "B C X N"]
    """From the block's first token to the query."""


class GatheredBlocks(NamedTuple):
    """The chosen blocks, per query and head."""

    landmark_k: Float[Array, "B C H N K"]
    k: Float[Array, "B C H N L K"]
    v: Float[Array, "B C H N L V"]


def landmark_log_probs(
    q: Float[Array, "B C H K"],
    landmark_k: Float[Array, "B M G K"],
    block_index: Int[Array, "B M"],
    visible: Bool[Array, "B C M"],
    positions: Int[Array, "B C"],
    block_size: int,
    retrieval: BlockRetrieval,
    rotate: Rotate,
) -> Float[Array, "B C H M"]:
    """Of each block's landmark among those that are visible; `NEVER` elsewhere."""
    size, mask = block_size + 1, visible[:, :, None]

    def scores(q: Array, marks: Array) -> Array:
        grouped = q.reshape(*q.shape[:2], marks.shape[2], -1, q.shape[-1])
        return einsum_f32("bcgrk,bmgk->bcgrm", grouped, marks).reshape(*q.shape[:3], -1)

    every = (*q.shape[:3],)
    logits = scores(
        rotate(q, jnp.broadcast_to(positions[:, :, None], every)),
        rotate_to_true_positions(landmark_k, block_index, size, rotate),
    )
    if retrieval.position_mode == "compressed":
        far = positions % size + (retrieval.top_k + 1) * size
        old = positions[:, :, None] // size - block_index[:, None] > retrieval.top_k
        away = scores(rotate(q, jnp.broadcast_to(far[:, :, None], every)), landmark_k)
        logits = jnp.where(old[:, :, None], away, logits)
    logits = jnp.where(mask, logits, MASKED_LOGIT)
    return jnp.where(mask, jax.nn.log_softmax(logits, axis=-1), MASKED_LOGIT)


def rotate_to_true_positions(
    x: Float[Array, "B M ... K"], block_index: Int[Array, "B M"], size: int, rotate: Rotate
) -> Float[Array, "B M ... K"]:
    """Keys of blocks turned to their true positions."""
    first = (block_index * size).reshape(*block_index.shape, *[1] * (x.ndim - 3))
    return rotate(x, jnp.broadcast_to(first, x.shape[:-1]))


def rotate_cache_to_true_positions(cache: LandmarkCache, num_seen: Int[Array, " B"], rotate: Rotate) -> LandmarkCache:
    """The cache with its keys at their true positions, as queries at theirs meet them; it has seen this many tokens."""
    slots, real = cache.k.shape[1:3]
    size, rows = real + 1, num_seen.shape[0]
    number = jnp.broadcast_to(jnp.arange(slots)[None], (rows, slots))
    own = rotate(
        cache.partial_k, jnp.broadcast_to((num_seen // size * size)[:, None, None], cache.partial_k.shape[:-1])
    )
    marks, k = (rotate_to_true_positions(x, number, size, rotate) for x in (cache.landmark_k, cache.k))
    return LandmarkCache(marks, k, cache.v, own, cache.partial_v)


def running_max(
    log_probs: Float[Array, "B H M"], values: Float[Array, "B C H M"], restart: Bool[Array, "B C"]
) -> Float[Array, "B C H M"]:
    """The running maximum over time, which starts again where `restart`; `log_probs` is what came before."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    flags = jnp.broadcast_to(restart[:, :, None, None], values.shape)
    begun, highest = jax.lax.associative_scan(join, (flags, values), axis=1)
    return jnp.where(begun, highest, jnp.maximum(log_probs[:, None], highest))


def unpack_log_probs(
    log_probs: Float[Array, "B H N"], position: Int[Array, " B"], block_size: int
) -> Float[Array, "B H N"]:
    """What a state holds of the largest log-probabilities, as it is before the token at `position`."""
    size = block_size + 1
    known = (jnp.arange(log_probs.shape[2])[None] < position[:, None] // size) & (position % size > 0)[:, None]
    return jnp.where(known[:, None], log_probs, MASKED_LOGIT)


def pack_log_probs(log_probs: Float[Array, "B H N"]) -> Float[Array, "B H N"]:
    """The form in which a state holds them: 0 where there is none."""
    return jnp.where(log_probs > MASKED_LOGIT / 2, log_probs, 0)


def select_blocks(
    ranking: Float[Array, "B C H M"],
    block_index: Int[Array, "B M"],
    positions: Int[Array, "B C"],
    block_size: int,
    retrieval: BlockRetrieval,
) -> SelectedBlocks:
    """The blocks of the k largest log-probabilities."""
    size, count = block_size + 1, ranking.shape[-1]
    if retrieval.selection_scope == "token":
        ranking = ranking.max(axis=2, keepdims=True)
    values, index = jax.lax.top_k(ranking, min(retrieval.top_k, count))
    least = math.log(retrieval.min_probability) if retrieval.min_probability > 0 else MASKED_LOGIT / 2
    index = jnp.sort(jnp.where(values >= least, index, count), axis=-1)
    row = jnp.arange(block_index.shape[0])[:, None, None, None]
    at = block_index[row, jnp.minimum(index, count - 1)]
    if retrieval.position_mode == "exact":
        return SelectedBlocks(index, positions[:, :, None, None] - at * size)
    return SelectedBlocks(
        index, compressed_distances(at, index < count, positions[:, :, None, None], size, retrieval.top_k)
    )


def compressed_distances(
    block_index: Int[Array, "... N"],
    selected: Bool[Array, "... N"],
    position: Int[Array, "... 1"],
    size: int,
    top_k: int,
) -> Int[Array, "... N"]:
    """Distances of the chosen blocks, in order, from a query at `position`: place + (places - own place) * size."""
    block = position // size
    places = jnp.minimum(block, top_k + 1)
    order = jnp.broadcast_to(jnp.arange(block_index.shape[-1]), block_index.shape)
    from_right = selected.sum(axis=-1, keepdims=True) - order
    back = jnp.where(block_index >= block - top_k, from_right, places - order)
    return position % size + back * size


def gather_blocks(
    blocks: LandmarkBlocks | LandmarkCache, index: Int[Array, "B C X N"], num_heads: int
) -> GatheredBlocks:
    """The chosen blocks of each head's group; zeros where nothing was chosen."""
    count, groups = blocks.landmark_k.shape[1:3]
    row = jnp.arange(index.shape[0])[:, None, None, None]
    group = (jnp.arange(num_heads) // (num_heads // groups))[None, None, :, None]
    at = jnp.minimum(index, count - 1)
    held = jnp.broadcast_to(index < count, (*index.shape[:2], num_heads, index.shape[3]))[..., None]
    marks = blocks.landmark_k[row, at, group]
    k, v = (x[row, at, :, group] for x in (blocks.k, blocks.v))
    return GatheredBlocks(jnp.where(held, marks, 0), *(jnp.where(held[..., None], x, 0) for x in (k, v)))


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
    """The blocks of a cache that tokens of one block choose, and the state's largest log-probabilities after them."""
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
    turned = rotate(jnp.broadcast_to(q[:, :, :, None], (*q.shape[:3], count, q.shape[-1])), distance)
    logits = einsum_f32("bchnk,bchnk->bchn", turned, gathered.landmark_k)
    scores = einsum_f32("bchnk,bchnlk->bchnl", turned, gathered.k)
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
    """The same for one token over all blocks of the cache, at true distances; its own token is in the cache."""
    slots, real, groups = cache.k.shape[1:4]
    size, rows = real + 1, position.shape[0]
    number = jnp.arange(slots)[None]
    visible = number < position[:, None] // size
    marks, k, v = (jnp.where(visible.reshape(rows, slots, *[1] * (x.ndim - 2)), x, 0) for x in cache[:3])
    distance = position[:, None] - number * size
    far = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], slots, q.shape[-1]))
    far = rotate(far, jnp.broadcast_to(distance[:, None], far.shape[:-1])).reshape(rows, groups, -1, slots, q.shape[-1])
    logits = einsum_f32("bgrmk,bmgk->bgrm", far, marks)
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
    """Keys and values of the unfinished block up to this position, zeros behind, and the mask."""
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
    """T further tokens: output in float32, all complete blocks, and (per head) their largest log-probabilities so far.

    q is scaled already; keys are turned to their place in the block only.
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
        valid &= (time < length)[None]  # the last chunk is filled up with the row's last token
        visible = visible_blocks(blocks, document, time) & valid[..., None]
        ranking = landmark_log_probs(
            q, blocks.landmark_k, blocks.block_index, visible, positions, real, retrieval, rotate
        )
        if best is not None:
            ranking = running_max(best, ranking, valid & (place == 0))
            best = ranking[:, -1]
        chosen = select_blocks(ranking, blocks.block_index, positions, real, retrieval)
        own, seen = slice_local_kv(slots, begin, start, real)
        held = chosen.index < blocks.landmark_time.shape[1]
        out = attend_selected_blocks(
            q, gather_blocks(blocks, chosen.index, heads), held, chosen.distance, own.k, own.v, seen, place, rotate
        )
        return best, out

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
    """One token, which is in the cache's unfinished block already unless it is a landmark."""
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
    held = chosen.index < count
    taken = gather_blocks(cache, chosen.index, heads)
    return attend_selected_blocks(q[:, None], taken, held, chosen.distance, own_k, own_v, seen[:, None], place, rotate)[
        :, 0
    ], log_probs


def _local_logits(
    q: Float[Array, "B C H K"],
    k: Float[Array, "B S G K"],
    visible: Bool[Array, "B C S"],
    offset: Int[Array, "B C"],
    rotate: Rotate,
) -> Float[Array, "B C H S"]:
    turned = rotate(q, jnp.broadcast_to(offset[:, :, None], q.shape[:-1]))
    turned = turned.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = einsum_f32("bcgrk,bsgk->bcgrs", turned, k).reshape(*q.shape[:3], -1)
    return jnp.where(visible[:, :, None], logits, MASKED_LOGIT)


def _joint_softmax(
    block_logits: Float[Array, "B C H N"], local_logits: Float[Array, "B C H S"]
) -> tuple[Float[Array, "B C H N"], Float[Array, "B C H S"]]:
    """The softmax over both, 0 where there is nothing."""
    logits = jnp.concatenate([block_logits, local_logits], axis=-1)
    p = jnp.where(logits > MASKED_LOGIT / 2, jax.nn.softmax(logits, axis=-1), 0)
    return p[..., : block_logits.shape[-1]], p[..., block_logits.shape[-1] :]


def _local_values(p: Float[Array, "B C H S"], v: Float[Array, "B S G V"]) -> Float[Array, "B C H V"]:
    rows, chunk, heads, slots = p.shape
    grouped = p.reshape(rows, chunk, v.shape[2], -1, slots).astype(v.dtype)
    return einsum_f32("bcgrs,bsgv->bcgrv", grouped, v).reshape(rows, chunk, heads, -1)
