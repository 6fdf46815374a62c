"""What tokens may be read: those of the state and the new ones in one list, and the states that are made of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import Documents, last_valid
from recallax.pallas_kernels.grid import rows_at
from recallax.pallas_kernels.window_attention.cache import held_positions

NEVER = -1e30
"""Finite, so that to see nothing does not make NaN."""


class EveryToken(NamedTuple):
    """All tokens of a document: position p stands in slot p."""

    k: Float[Array, "B N G K"]
    v: Float[Array, "B N G V"]
    offer: Float[Array, "B N R"]
    asked: Float[Array, "B R"] | None
    """What the unfinished block asked with; None where blocks do not ask."""


class GlobalHeap(NamedTuple):
    """The window's tokens, position p in slot p mod W, and the tokens chosen for the newest block, in order of time."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G V"]
    offer: Float[Array, "B W R"]
    chosen_k: Float[Array, "B C G K"]
    chosen_v: Float[Array, "B C G V"]
    chosen_offer: Float[Array, "B C R"]
    number: Int[Array, "B C"]
    """1 + position of a chosen token; 0 where a slot is empty."""


type Held = EveryToken | GlobalHeap


class Pool(NamedTuple):
    """Candidates in order of time. The last of what was held stands just before the first new token."""

    k: Float[Array, "B P G K"]
    v: Float[Array, "B P G V"]
    offer: Float[Array, "B P R"]
    position: Int[Array, "B P"]
    document: Int[Array, "B P"]
    """0 for the row's first one, which what was held belongs to; -1 for what is no token."""
    new: int
    """Index of the first new token."""


class Blocks(NamedTuple):
    """Blocks of queries: what document they belong to, where they begin, and what they ask with."""

    document: Int[Array, "N B"]
    first: Int[Array, "N B"]
    """Position of the block's first token."""
    ask: Float[Array, "N B R"]


def pooled(held: Held | None, k: Array, v: Array, offer: Array, positions: Int[Array, "B T"], docs: Documents) -> Pool:
    """The candidates of these tokens."""
    new = Pool(k, v, offer, positions, jnp.where(docs.valid, docs.index, -1), 0)
    if held is None:
        return new
    seen, slots = positions[:, 0], held.k.shape[1]  # padding stands on the right
    recent = seen[:, None] - slots + jnp.arange(slots, dtype=seen.dtype)[None]
    at = recent % slots
    parts = [_past(rows_at(held.k, at), rows_at(held.v, at), rows_at(held.offer, at), recent, recent >= 0)]
    if isinstance(held, GlobalHeap):
        position = held.number - 1
        older = (position >= 0) & (position < recent[:, :1])  # what the window still holds is not listed twice
        parts.insert(0, _past(held.chosen_k, held.chosen_v, held.chosen_offer, position, older))
    columns = zip(*parts, new[:5], strict=True)
    k, v, offer, position, document = (
        jnp.concatenate([*(x.astype(y.dtype) for x in old), y], axis=1) for *old, y in columns
    )
    return Pool(k, v, offer, position, document, sum(part[0].shape[1] for part in parts))


def _past(k: Array, v: Array, offer: Array, position: Array, valid: Bool[Array, "B N"]) -> tuple[Array, ...]:
    """An empty slot may hold anything, NaN included."""
    k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
    return k, v, jnp.where(valid[..., None], offer, 0), position, jnp.where(valid, 0, -1)


def scores(offer: Float[Array, "... R"], ask: Float[Array, "... R"]) -> Float[Array, "..."]:
    """How much a block wants a token; in the offers' dtype, which is float32 or wider."""
    return jnp.sum(offer * ask, axis=-1)


def eligible(
    pool: Pool, document: Int[Array, " B"], first: Int[Array, " B"], size: int, window: int
) -> Bool[Array, "B P"]:
    """Tokens that the window of the block's last token does not reach."""
    return (pool.document == document[:, None]) & (pool.position < first[:, None] + size - window)


def latest(pool: Pool, held: Held, docs: Documents, blocks: Blocks, chosen: tuple[Array, Array]) -> Held:
    """What is held after these tokens: of each row's last document; `chosen` are the indices and mask of its newest
    block, `blocks` that block alone. Rows without any token keep what they have."""
    last = last_valid(docs)
    newest = jnp.take_along_axis(pool.position, pool.new + jnp.maximum(last, 0)[:, None], axis=1)
    position = held_positions(newest[:, 0] + 1, held.k.shape[1])
    index = pool.new + last[:, None] - (newest - position)
    recent = _taken(pool, index, position >= 0)
    if isinstance(held, EveryToken):
        after: Held = EveryToken(*recent, None if held.asked is None else blocks.ask[0])
    else:
        index, mask = chosen
        number = jnp.where(mask, rows_at(pool.position, index) + 1, 0)
        after = GlobalHeap(*recent, *_taken(pool, index, mask), number)
    empty = last < 0

    def keep(old: Array, new: Array) -> Array:
        return jnp.where(empty.reshape(-1, *[1] * (old.ndim - 1)), old, new.astype(old.dtype))

    return jax.tree.map(keep, held, after)


def _taken(pool: Pool, index: Int[Array, "B N"], mask: Bool[Array, "B N"]) -> tuple[Array, Array, Array]:
    index = jnp.clip(index, 0, pool.k.shape[1] - 1)
    k, v, offer = (rows_at(x, index) for x in pool[:3])
    k, v = (jnp.where(mask[..., None, None], x, 0) for x in (k, v))
    return k, v, jnp.where(mask[..., None], offer, 0)
