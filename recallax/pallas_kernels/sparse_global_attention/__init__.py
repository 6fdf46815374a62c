"""Softmax attention over a window and up to C chosen tokens of all that lie before it.

    y_i = sum_j softmax_j(scale * q_i.k_j + [j in G(i)] log sigmoid(score_j)) v_j      over i-w < j <= i and j in G(i)
    G(i) = the C largest scores among the tokens that the window of the last token of i's block does not reach

Blocks of queries share what is chosen, so the choice depends on nothing later than a block's first token. The logarithm
is how a score gets a gradient; without it (`weighed=False`) the choice is all that scores do. A score is what a token
offers, or the product of that with what the block's first token asks.

Scores that depend on the token alone never let a token back in that has left the C largest: then `GlobalHeap`, of
constant size, gives the same outputs as `EveryToken`, which has to be kept where blocks ask.
Source: the equation of Hydra's sparse global attention is not published (arXiv 2508.15099 names a window and chosen
tokens); this is one that is causal and differentiable.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import Documents, documents, last_valid
from recallax.pallas_kernels.dispatch import call, require
from recallax.pallas_kernels.grid import Pieces, off_grid, pieces, rows_at
from recallax.pallas_kernels.sparse_global_attention import reference, xla
from recallax.pallas_kernels.sparse_global_attention.pool import (
    Blocks,
    EveryToken,
    GlobalHeap,
    Held,
    Pool,
    latest,
    pooled,
)

__all__ = ["FORMS", "EveryToken", "GlobalHeap", "Held", "empty_heap", "empty_tokens", "sparse_global_attention"]


def _dense(q, pool, positions, docs, blocks, index, mask, parts, begun, window, size, weighed, chosen):
    place = jnp.arange(q.shape[1])[None] + (jnp.zeros_like(positions[:, :1]) if begun is None else begun[:, None])
    ask = rows_at(jnp.moveaxis(blocks.ask, 0, 1), jnp.broadcast_to(place, positions.shape) // size)
    return reference.attend(q, pool, positions, docs, ask, window, chosen, size, weighed)


def _blockwise(*arguments):
    *rest, _ = arguments
    return xla.blockwise(*rest)


FORMS = {"reference": _dense, "xla": _blockwise}


def sparse_global_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    offer: Float[Array, "B T R"],
    ask: Float[Array, "B T R"] | None = None,
    *,
    window: int,
    chosen: int,
    block: int,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: Held | None = None,
    weighed: bool = True,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Held | None]:
    """Output in v's dtype and what is held after these tokens (None if nothing was).

    offer, ask: float32; without `ask` a score is the sum of a token's offer. window: tokens that a query sees in any
    case, itself included. chosen: C. block: queries that share a choice, at most `window`; documents begin at multiples
    of it, and rows where they do not are NaN. positions: within the document; with a state the row's first one counts
    the tokens held. Raises ValueError where sizes disagree.
    """
    op = "sparse_global_attention"
    b, t, h, width = q.shape
    g = k.shape[2]
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == (b, t, g, width), f"k has shape {k.shape}; it must be {(b, t, 'G', width)}")
    require(op, v.shape[:3] == (b, t, g), f"v has shape {v.shape}; it must begin with {(b, t, g)}")
    require(op, h % g == 0, f"{h} query heads cannot share {g} key/value heads; use a divisor of {h}")
    require(op, offer.shape[:2] == (b, t), f"offer has shape {offer.shape}; it must begin with {(b, t)}")
    require(op, ask is None or ask.shape == offer.shape, "ask must have the shape of offer")
    require(op, 1 <= block <= window, f"block is {block}; it must be from 1 to the window of {window} tokens")
    require(op, chosen >= 1, f"chosen is {chosen}; it must be at least 1 token")
    heap = isinstance(state, GlobalHeap)
    require(
        op, not (heap and ask is not None), "a heap forgets tokens that a later block may ask for; keep every token"
    )
    docs = documents(segments)
    begun = None if state is None else positions[:, 0] % block
    parts = pieces(t, block, begun, b)
    pool = pooled(state, k, v, offer, positions, docs)
    past = state.asked if isinstance(state, EveryToken) else None
    blocks = _blocks(parts, positions, docs, offer, ask, past, block)
    index, mask = xla.choose(pool, blocks, chosen, block, window)
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    arguments = (pool, positions, docs, blocks, index, mask, parts, begun, window, block, weighed, chosen)
    out = call(op, FORMS, implementation, q, *arguments).astype(v.dtype)
    wrong = off_grid(positions, segments, parts, block)
    out = jnp.where(wrong[:, None, None, None], jnp.full_like(out, jnp.nan), out)
    if state is None:
        return out, None
    return out, _after(pool, state, docs, positions, offer, ask, past, chosen, block, window)


def empty_tokens(
    batch: int, slots: int, groups: int, keys: int, values: int, offers: int, asks: bool, dtype
) -> EveryToken:
    """Nothing held yet, with a slot for each of `slots` tokens."""
    asked = jnp.zeros((batch, offers), jnp.float32) if asks else None
    return EveryToken(*_slots(batch, slots, groups, keys, values, offers, dtype), asked)


def empty_heap(
    batch: int, window: int, chosen: int, groups: int, keys: int, values: int, offers: int, dtype
) -> GlobalHeap:
    """Nothing held yet."""
    recent, best = (_slots(batch, n, groups, keys, values, offers, dtype) for n in (window, chosen))
    return GlobalHeap(*recent, *best, jnp.zeros((batch, chosen), jnp.int32))


def _slots(
    batch: int, count: int, groups: int, keys: int, values: int, offers: int, dtype
) -> tuple[Float[Array, "B N G K"], Float[Array, "B N G V"], Float[Array, "B N R"]]:
    k, v = (jnp.zeros((batch, count, groups, n), dtype) for n in (keys, values))
    return k, v, jnp.zeros((batch, count, offers), jnp.float32)


def _blocks(
    parts: Pieces,
    positions: Int[Array, "B T"],
    docs: Documents,
    offer: Float[Array, "B T R"],
    ask: Float[Array, "B T R"] | None,
    past: Float[Array, "B R"] | None,
    size: int,
) -> Blocks:
    """The blocks of the pieces. A piece that starts within a block asks with what that block's first token did."""
    source = parts.source[..., 0].T
    first = rows_at(positions, source).T // size * size
    if ask is None:
        asks = jnp.ones((*first.shape, offer.shape[2]), offer.dtype)
    else:
        asks = jnp.moveaxis(rows_at(ask, source), 1, 0)
        if past is not None:
            asks = jnp.where((parts.place[..., 0] > 0)[..., None], past[None].astype(asks.dtype), asks)
    return Blocks(rows_at(docs.index, source).T, first, asks)


def _after(
    pool: Pool,
    state: Held,
    docs: Documents,
    positions: Int[Array, "B T"],
    offer: Float[Array, "B T R"],
    ask: Float[Array, "B T R"] | None,
    past: Float[Array, "B R"] | None,
    chosen: int,
    size: int,
    window: int,
) -> Held:
    """What is held after these tokens."""
    last = jnp.maximum(last_valid(docs), 0)[:, None]
    newest = rows_at(positions, last)
    begin = last - newest % size
    asks = jnp.ones((1, *offer[:, 0].shape), offer.dtype)
    if ask is not None:
        asks = rows_at(ask, jnp.maximum(begin, 0))
        asks = (asks if past is None else jnp.where((begin < 0)[..., None], past[:, None].astype(asks.dtype), asks))[
            None, :, 0
        ]
    block = Blocks(rows_at(docs.index, last).T, newest.T // size * size, asks)
    wanted = state.number.shape[1] if isinstance(state, GlobalHeap) else 1
    index, mask = (x[0] for x in xla.choose(pool, block, wanted, size, window))
    missing = wanted - index.shape[1]
    if missing > 0:
        index, mask = (jnp.pad(x, ((0, 0), (0, missing))) for x in (index, mask))
    return latest(pool, state, docs, block, (index, mask))
