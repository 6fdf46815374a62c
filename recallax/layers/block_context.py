"""Keys and values of an unfinished block, in slots that are filled from left to right.

`recallax.layers.memory_as_context` stores the tokens of the current block, and the vectors retrieved for it, in this
form.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from recallax.layers.base import State
from recallax.layers.state_reset import zero_rows
from recallax.pallas_kernels.grid import gather_tokens
from recallax.pallas_kernels.window_attention import KVCache

type QuerySource = Literal["own", "previous", "learned"]


class BlockContext(NamedTuple):
    """Keys and values that tokens of an unfinished block may read; zeros in unused slots and between blocks."""

    memory_at_start: State | None
    """Memory at the start of the block; None except for query source "own"."""
    token_kv: KVCache
    """Keys and values of the block's tokens."""
    retrieved_kv: KVCache
    """Keys and values of retrieved vectors."""


def visible_retrieved(
    query_source: QuerySource, slots: Int[Array, "B N"], count: int, has_previous: Bool[Array, " B"]
) -> Bool[Array, "B N M"]:
    """Compute the mask of retrieved vectors that each token may read.

    Args:
        query_source: Source of the queries.
        slots: Offset of each token in its block.
        count: Number of retrieved vectors.
        has_previous: False in a document's first block.

    Returns:
        True where the token may read the retrieved vector.
    """
    if query_source == "own":
        return causal_slot_mask(slots, count)
    visible = has_previous if query_source == "previous" else jnp.ones_like(has_previous)
    return jnp.broadcast_to(visible[:, None, None], (*slots.shape, count))


def causal_slot_mask(slots: Int[Array, "B N"], count: int) -> Bool[Array, "B N S"]:
    """Compute the mask of slots that each token may read: its own and earlier ones.

    Args:
        slots: Slot of each token.
        count: Number of slots.

    Returns:
        True where the token may read the slot.
    """
    return jnp.arange(count)[None, None] <= slots[..., None]


def write_slots[Tree](new: Tree, old: Tree, start: Int[Array, " B"]) -> Tree:
    """Write entries to consecutive slots.

    Args:
        new: Arrays [B, N, ...] to write.
        old: Arrays [B, S, ...] of the same structure; slots before `start` keep their entries.
        start: First slot to write in each row.

    Returns:
        Arrays [B, S, ...] in the dtypes of `old`; slots after the written ones repeat the last entry.
    """

    def write(new: Array, old: Array) -> Array:
        source = jnp.arange(old.shape[1])[None] - start[:, None]
        moved = gather_tokens(new, jnp.clip(source, 0, new.shape[1] - 1)).astype(old.dtype)
        return jnp.where((source >= 0).reshape(*source.shape, *[1] * (old.ndim - 2)), moved, old)

    return jax.tree.map(write, new, old)


def clear_unused_slots(
    block: BlockContext, end: Int[Array, " B"], block_size: int, query_source: QuerySource
) -> BlockContext:
    """Set unused slots to zero, and all slots of full blocks.

    Args:
        block: Keys and values after the last token.
        end: Number of tokens in each row's block.
        block_size: Tokens of a full block.
        query_source: Source of the queries; with "own" each token has one retrieved vector.

    Returns:
        The block as it is stored in the state.
    """
    unfinished = end < block_size

    def clear(x: Array) -> Array:
        used = (jnp.arange(x.shape[1])[None] < end[:, None]) & unfinished[:, None]
        return jnp.where(used[..., None, None], x, 0)

    memory_at_start, token_kv, retrieved_kv = block
    token_kv = jax.tree.map(clear, token_kv)
    own = query_source == "own"
    retrieved_kv = jax.tree.map(clear, retrieved_kv) if own else zero_rows(retrieved_kv, ~unfinished)
    return BlockContext(zero_rows(memory_at_start, ~unfinished), token_kv, retrieved_kv)
