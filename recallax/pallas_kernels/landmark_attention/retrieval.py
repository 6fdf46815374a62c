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
from recallax.pallas_kernels.landmark_attention.blocks import Blocks, LandmarkCache, complete_blocks, near, seen_from
from recallax.pallas_kernels.landmark_attention.xla import NEVER, documents_of, own_slots, padded
from recallax.pallas_kernels.product import product

CHUNK = 16
"""Queries at a time, each of which gathers blocks of its own."""

type Per = Literal["head and token", "head", "token"]
type Distances = Literal["stingy", "true"]
type Turn = Callable[[Float[Array, "... K"], Int[Array, "..."]], Float[Array, "... K"]]
"""Rotates queries by a distance, and keys by a place."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How many blocks are read, who chooses them, and how far away they seem to be."""

    top_k: int
    per: Per = "head and token"
    distances: Distances = "stingy"
    min_probability: float = 0.0
    """Of a landmark among all earlier ones; what lies below is not read."""


class Chosen(NamedTuple):
    """Blocks to read, in the order of time; X is H, or 1 where all heads read the same."""

    index: Int[Array, "B C X N"]
    """Among the blocks there are; their number where nothing was chosen."""
    distance: Int[Array, "B C X N"]
    """From the block's first token to the query."""


class Taken(NamedTuple):
    """The chosen blocks, per query and head."""

    marks: Float[Array, "B C H N K"]
    k: Float[Array, "B C H N L K"]
    v: Float[Array, "B C H N L V"]


def log_probabilities(
    q: Float[Array, "B C H K"],
    marks: Float[Array, "B M G K"],
    number: Int[Array, "B M"],
    visible: Bool[Array, "B C M"],
    positions: Int[Array, "B C"],
    real: int,
    how: Retrieval,
    turn: Turn,
) -> Float[Array, "B C H M"]:
    """Of each block's landmark among those that are visible; `NEVER` elsewhere."""
    size, mask = real + 1, visible[:, :, None]

    def scores(q: Array, marks: Array) -> Array:
        grouped = q.reshape(*q.shape[:2], marks.shape[2], -1, q.shape[-1])
        return product("bcgrk,bmgk->bcgrm", grouped, marks).reshape(*q.shape[:3], -1)

    every = (*q.shape[:3],)
    logits = scores(turn(q, jnp.broadcast_to(positions[:, :, None], every)), at_home(marks, number, size, turn))
    if how.distances == "stingy":
        far = positions % size + (how.top_k + 1) * size
        old = positions[:, :, None] // size - number[:, None] > how.top_k
        away = scores(turn(q, jnp.broadcast_to(far[:, :, None], every)), marks)
        logits = jnp.where(old[:, :, None], away, logits)
    logits = jnp.where(mask, logits, NEVER)
    return jnp.where(mask, jax.nn.log_softmax(logits, axis=-1), NEVER)


def at_home(
    x: Float[Array, "B M ... K"], number: Int[Array, "B M"], size: int, turn: Turn
) -> Float[Array, "B M ... K"]:
    """Keys of blocks turned to their true positions."""
    first = (number * size).reshape(*number.shape, *[1] * (x.ndim - 3))
    return turn(x, jnp.broadcast_to(first, x.shape[:-1]))


def turned_home(cache: LandmarkCache, seen: Int[Array, " B"], turn: Turn) -> LandmarkCache:
    """The cache with its keys at their true positions, as queries at theirs meet them; it has seen this many tokens."""
    slots, real = cache.k.shape[1:3]
    size, rows = real + 1, seen.shape[0]
    number = jnp.broadcast_to(jnp.arange(slots)[None], (rows, slots))
    own = turn(cache.own_k, jnp.broadcast_to((seen // size * size)[:, None, None], cache.own_k.shape[:-1]))
    marks, k = (at_home(x, number, size, turn) for x in (cache.marks, cache.k))
    return LandmarkCache(marks, k, cache.v, own, cache.own_v)


def largest_so_far(
    best: Float[Array, "B H M"], values: Float[Array, "B C H M"], afresh: Bool[Array, "B C"]
) -> Float[Array, "B C H M"]:
    """The running maximum over time, which starts again where `afresh`; `best` is what came before."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    flags = jnp.broadcast_to(afresh[:, :, None, None], values.shape)
    begun, highest = jax.lax.associative_scan(join, (flags, values), axis=1)
    return jnp.where(begun, highest, jnp.maximum(best[:, None], highest))


def unpacked(best: Float[Array, "B H N"], position: Int[Array, " B"], real: int) -> Float[Array, "B H N"]:
    """What a state holds of the largest log-probabilities, as it is before the token at `position`."""
    size = real + 1
    known = (jnp.arange(best.shape[2])[None] < position[:, None] // size) & (position % size > 0)[:, None]
    return jnp.where(known[:, None], best, NEVER)


def packed(best: Float[Array, "B H N"]) -> Float[Array, "B H N"]:
    """The form in which a state holds them: 0 where there is none."""
    return jnp.where(best > NEVER / 2, best, 0)


def choose(
    ranking: Float[Array, "B C H M"], number: Int[Array, "B M"], positions: Int[Array, "B C"], real: int, how: Retrieval
) -> Chosen:
    """The blocks of the k largest log-probabilities."""
    size, count = real + 1, ranking.shape[-1]
    if how.per == "token":
        ranking = ranking.max(axis=2, keepdims=True)
    values, index = jax.lax.top_k(ranking, min(how.top_k, count))
    least = math.log(how.min_probability) if how.min_probability > 0 else NEVER / 2
    index = jnp.sort(jnp.where(values >= least, index, count), axis=-1)
    row = jnp.arange(number.shape[0])[:, None, None, None]
    at = number[row, jnp.minimum(index, count - 1)]
    if how.distances == "true":
        return Chosen(index, positions[:, :, None, None] - at * size)
    return Chosen(index, stingy(at, index < count, positions[:, :, None, None], size, how.top_k))


def stingy(
    number: Int[Array, "... N"], held: Bool[Array, "... N"], position: Int[Array, "... 1"], size: int, top_k: int
) -> Int[Array, "... N"]:
    """Distances of the chosen blocks, in order, from a query at `position`: place + (places - own place) * size."""
    block = position // size
    places = jnp.minimum(block, top_k + 1)
    order = jnp.broadcast_to(jnp.arange(number.shape[-1]), number.shape)
    from_right = held.sum(axis=-1, keepdims=True) - order
    back = jnp.where(number >= block - top_k, from_right, places - order)
    return position % size + back * size


def take(blocks: Blocks | LandmarkCache, index: Int[Array, "B C X N"], heads: int) -> Taken:
    """The chosen blocks of each head's group; zeros where nothing was chosen."""
    count, groups = blocks.marks.shape[1:3]
    row = jnp.arange(index.shape[0])[:, None, None, None]
    group = (jnp.arange(heads) // (heads // groups))[None, None, :, None]
    at = jnp.minimum(index, count - 1)
    held = jnp.broadcast_to(index < count, (*index.shape[:2], heads, index.shape[3]))[..., None]
    marks = blocks.marks[row, at, group]
    k, v = (x[row, at, :, group] for x in (blocks.k, blocks.v))
    return Taken(jnp.where(held, marks, 0), *(jnp.where(held[..., None], x, 0) for x in (k, v)))


def look(
    q: Float[Array, "B C H K"],
    marks: Float[Array, "B N G K"],
    number: Int[Array, "B N"],
    visible: Bool[Array, "B C N"],
    positions: Int[Array, "B C"],
    real: int,
    best: Float[Array, "B H N"] | None,
    how: Retrieval,
    turn: Turn,
) -> tuple[Chosen, Float[Array, "B H N"] | None]:
    """The blocks of a cache that tokens of one block choose, and the state's largest log-probabilities after them."""
    marks = jnp.where(visible.any(axis=1)[..., None, None], marks, 0)
    ranking = log_probabilities(q, marks, number, visible, positions, real, how, turn)
    if best is not None:
        place = positions % (real + 1)
        ranking = largest_so_far(unpacked(best, positions[:, 0], real), ranking, place == 0)
        best = packed(ranking[:, -1])
    return choose(ranking, number, positions, real, how), best


def read(
    q: Float[Array, "B C H K"],
    taken: Taken,
    held: Bool[Array, "B C X N"],
    distance: Int[Array, "B C X N"],
    own_k: Float[Array, "B S G K"],
    own_v: Float[Array, "B S G V"],
    visible: Bool[Array, "B C S"],
    place: Int[Array, "B C"],
    turn: Turn,
) -> Float[Array, "B C H V"]:
    """The grouped softmax over the chosen blocks and the own one, in float32; q is scaled already."""
    heads, count = taken.marks.shape[2:4]
    distance, held = (jnp.broadcast_to(x, (*x.shape[:2], heads, count)) for x in (distance, held))
    turned = turn(jnp.broadcast_to(q[:, :, :, None], (*q.shape[:3], count, q.shape[-1])), distance)
    logits = product("bchnk,bchnk->bchn", turned, taken.marks)
    scores = product("bchnk,bchnlk->bchnl", turned, taken.k)
    inside = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    p, own = _shares(jnp.where(held, logits, NEVER), _own_logits(q, own_k, visible, place, turn))
    weights = inside * (jnp.where(held, p, 0) / inside.sum(axis=-1))[..., None]
    far = product("bchnl,bchnlv->bchv", weights.astype(taken.v.dtype), taken.v)
    return far + _own_values(own, own_v)


def read_all(
    q: Float[Array, "B H K"], cache: LandmarkCache, position: Int[Array, " B"], turn: Turn
) -> Float[Array, "B H V"]:
    """The same for one token over all blocks of the cache, at true distances; its own token is in the cache."""
    slots, real, groups = cache.k.shape[1:4]
    size, rows = real + 1, position.shape[0]
    number = jnp.arange(slots)[None]
    visible = number < position[:, None] // size
    marks, k, v = (jnp.where(visible.reshape(rows, slots, *[1] * (x.ndim - 2)), x, 0) for x in cache[:3])
    distance = position[:, None] - number * size
    far = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], slots, q.shape[-1]))
    far = turn(far, jnp.broadcast_to(distance[:, None], far.shape[:-1])).reshape(rows, groups, -1, slots, q.shape[-1])
    logits = product("bgrmk,bmgk->bgrm", far, marks)
    scores = product("bgrmk,bmlgk->bgrml", far, k)
    inside = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    own_k, own_v, seen = own_of(cache, position)
    own = _own_logits(q[:, None], own_k, seen[:, None], (position % size)[:, None], turn)
    logits = jnp.where(visible[:, None, None], logits, NEVER).reshape(rows, 1, q.shape[1], slots)
    p, own = _shares(logits, own)
    p = jnp.where(visible[:, None, None], p.reshape(rows, groups, -1, slots), 0)
    weights = inside * (p / inside.sum(axis=-1))[..., None]
    out = product("bgrml,bmlgv->bgrv", weights.astype(v.dtype), v).reshape(rows, q.shape[1], -1)
    return out + _own_values(own, own_v)[:, 0]


def own_of(cache: LandmarkCache, position: Int[Array, " B"]) -> tuple[Array, Array, Bool[Array, "B L"]]:
    """Keys and values of the unfinished block up to this position, zeros behind, and the mask."""
    real = cache.own_k.shape[1]
    seen = jnp.arange(real)[None] <= position[:, None] % (real + 1)
    k, v = (jnp.where(seen[..., None, None], x, 0) for x in (cache.own_k, cache.own_v))
    return k, v, seen


def retrieve(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    past: LandmarkCache,
    best: Float[Array, "B H N"] | None,
    how: Retrieval,
    turn: Turn,
) -> tuple[Float[Array, "B T H V"], Blocks, Float[Array, "B H M"] | None]:
    """T further tokens: output in float32, all complete blocks, and (per head) their largest log-probabilities so far.

    q is scaled already; keys are turned to their place in the block only.
    """
    length, heads = q.shape[1:3]
    real = past.own_k.shape[1]
    docs = documents_of(segments, positions)
    blocks = complete_blocks(k, v, docs, positions, real, past)
    chunk = min(CHUNK, length)
    place = positions % (real + 1)
    slots = padded(near(k, v, docs, positions, real, past), -length % chunk)
    begin = jnp.arange(length)[None] - place
    if best is not None:
        before = unpacked(best, positions[:, 0], real)
        new = ((0, 0), (0, 0), (0, blocks.time.shape[1] - best.shape[2]))
        best = jnp.pad(before, new, constant_values=NEVER)

    def one(best: Array | None, part: tuple[Array, ...]) -> tuple[Array | None, Array]:
        start, q, document, valid, positions, begin = part
        time, place = start + jnp.arange(chunk), positions % (real + 1)
        valid &= (time < length)[None]  # the last chunk is filled up with the row's last token
        visible = seen_from(blocks, document, time) & valid[..., None]
        ranking = log_probabilities(q, blocks.marks, blocks.number, visible, positions, real, how, turn)
        if best is not None:
            ranking = largest_so_far(best, ranking, valid & (place == 0))
            best = ranking[:, -1]
        chosen = choose(ranking, blocks.number, positions, real, how)
        own, seen = own_slots(slots, begin, start, real)
        held = chosen.index < blocks.time.shape[1]
        out = read(q, take(blocks, chosen.index, heads), held, chosen.distance, own.k, own.v, seen, place, turn)
        return best, out

    starts = jnp.arange(0, length, chunk)
    cut = (split_time(x, chunk) for x in (q, docs.index, docs.valid, positions, begin))
    best, out = jax.lax.scan(one, best, (starts, *cut))
    return join_time(out, length), blocks, None if best is None else packed(best)


def retrieve_step(
    q: Float[Array, "B H K"],
    cache: LandmarkCache,
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
    best: Float[Array, "B H N"] | None,
    how: Retrieval,
    turn: Turn,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H N"] | None]:
    """One token, which is in the cache's unfinished block already unless it is a landmark."""
    count, real, heads = cache.marks.shape[1], cache.own_k.shape[1], q.shape[1]
    number = jnp.broadcast_to(jnp.arange(count)[None], (position.shape[0], count))
    visible = number < position[:, None] // (real + 1)
    at, place = position[:, None], position[:, None] % (real + 1)
    chosen, after = look(q[:, None], cache.marks, number, visible[:, None], at, real, best, how, turn)
    if best is not None and after is not None:
        best = jnp.where(active[:, None, None], after, best)
    own_k, own_v, seen = own_of(cache, position)
    held = chosen.index < count
    taken = take(cache, chosen.index, heads)
    return read(q[:, None], taken, held, chosen.distance, own_k, own_v, seen[:, None], place, turn)[:, 0], best


def _own_logits(
    q: Float[Array, "B C H K"],
    k: Float[Array, "B S G K"],
    visible: Bool[Array, "B C S"],
    place: Int[Array, "B C"],
    turn: Turn,
) -> Float[Array, "B C H S"]:
    turned = turn(q, jnp.broadcast_to(place[:, :, None], q.shape[:-1]))
    turned = turned.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = product("bcgrk,bsgk->bcgrs", turned, k).reshape(*q.shape[:3], -1)
    return jnp.where(visible[:, :, None], logits, NEVER)


def _shares(
    far: Float[Array, "B C H N"], own: Float[Array, "B C H S"]
) -> tuple[Float[Array, "B C H N"], Float[Array, "B C H S"]]:
    """The softmax over both, 0 where there is nothing."""
    logits = jnp.concatenate([far, own], axis=-1)
    p = jnp.where(logits > NEVER / 2, jax.nn.softmax(logits, axis=-1), 0)
    return p[..., : far.shape[-1]], p[..., far.shape[-1] :]


def _own_values(p: Float[Array, "B C H S"], v: Float[Array, "B S G V"]) -> Float[Array, "B C H V"]:
    rows, chunk, heads, slots = p.shape
    grouped = p.reshape(rows, chunk, v.shape[2], -1, slots).astype(v.dtype)
    return product("bcgrs,bsgv->bcgrv", grouped, v).reshape(rows, chunk, heads, -1)
