"""Selection of the past blocks that the queries of landmark attention read.

Keys are rotated by their offset in the block only, and a query is rotated by its distance to the first token of a
block. Distances are exact or compressed. Compressed: the last k blocks have their exact distance and all older ones a
distance of k + 1 blocks, so that no distance exceeds k + 2 blocks. The selected blocks are then assigned in temporal
order to k + 1 places, those of the last k blocks to the right and older ones to the left.

Blocks are selected per head and token, per token (by the largest probability over the heads), or per head (by the
largest probability over the tokens of the query's block so far; the published rule uses all tokens of a chunk, later
ones included, which is not causal). Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), sections 3.2 and 3.3; the
threshold is that of appendix D.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.masked_logit import MASKED_LOGIT

type SelectionScope = Literal["head_and_token", "head", "token"]
type PositionMode = Literal["compressed", "exact"]
type Rotate = Callable[[Float[Array, "... K"], Int[Array, "..."]], Float[Array, "... K"]]
"""Rotary embedding: rotates queries by a distance and keys by an offset."""


@dataclass(frozen=True, kw_only=True)
class BlockRetrieval:
    """Options of the retrieval of past blocks."""

    top_k: int
    """Upper bound of the blocks that a query reads."""
    selection_scope: SelectionScope = "head_and_token"
    """Queries and heads that share a selection: none, all tokens of a block ("head"), or all heads ("token")."""
    position_mode: PositionMode = "compressed"
    """Distances of blocks: exact, or limited to top_k + 2 blocks."""
    min_probability: float = 0.0
    """Blocks are not read if the softmax probability of their landmark among all earlier landmarks is lower."""


class SelectedBlocks(NamedTuple):
    """Blocks that queries read, in temporal order; X is H, or 1 if all heads read the same blocks."""

    index: Int[Array, "B C X N"]
    """Index of the block; the number of blocks if fewer than N are selected."""
    distance: Int[Array, "B C X N"]
    """Distance from the first token of the block to the query."""


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
    """Return the log-probability of each landmark among the visible ones; MASKED_LOGIT for the others.

    Args:
        q: Scaled queries.
        landmark_k: Keys of the landmarks.
        block_index: Index of each block in its document.
        visible: True where the query may read the block.
        positions: Positions of the queries within documents.
        block_size: Tokens of a block besides its landmark.
        retrieval: Number and selection of the blocks.
        rotate: Rotary embedding of queries and keys.
    """
    size, mask = block_size + 1, visible[:, :, None]

    def scores(q: Array, landmark_k: Array) -> Array:
        grouped = q.reshape(*q.shape[:2], landmark_k.shape[2], -1, q.shape[-1])
        return einsum_f32("bcgrk,bmgk->bcgrm", grouped, landmark_k).reshape(*q.shape[:3], -1)

    heads_shape = (*q.shape[:3],)
    logits = scores(
        rotate(q, jnp.broadcast_to(positions[:, :, None], heads_shape)),
        rotate_to_true_positions(landmark_k, block_index, size, rotate),
    )
    if retrieval.position_mode == "compressed":
        far_distance = positions % size + (retrieval.top_k + 1) * size
        far = positions[:, :, None] // size - block_index[:, None] > retrieval.top_k
        far_logits = scores(rotate(q, jnp.broadcast_to(far_distance[:, :, None], heads_shape)), landmark_k)
        logits = jnp.where(far[:, :, None], far_logits, logits)
    logits = jnp.where(mask, logits, MASKED_LOGIT)
    return jnp.where(mask, jax.nn.log_softmax(logits, axis=-1), MASKED_LOGIT)


def rotate_to_true_positions(
    x: Float[Array, "B M ... K"], block_index: Int[Array, "B M"], size: int, rotate: Rotate
) -> Float[Array, "B M ... K"]:
    """Rotate the keys of blocks to their exact positions.

    Args:
        x: Keys, rotated by their offset in the block.
        block_index: Index of each block in its document.
        size: Tokens of a block, including its landmark.
        rotate: Rotary embedding.
    """
    first = (block_index * size).reshape(*block_index.shape, *[1] * (x.ndim - 3))
    return rotate(x, jnp.broadcast_to(first, x.shape[:-1]))


def running_max(
    log_probs: Float[Array, "B H M"], values: Float[Array, "B C H M"], restart: Bool[Array, "B C"]
) -> Float[Array, "B C H M"]:
    """Return the running maximum over time.

    Args:
        log_probs: Maximum before the first token.
        values: Values of C tokens.
        restart: Tokens at which the maximum restarts.
    """

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    flags = jnp.broadcast_to(restart[:, :, None, None], values.shape)
    restarted, highest = jax.lax.associative_scan(join, (flags, values), axis=1)
    return jnp.where(restarted, highest, jnp.maximum(log_probs[:, None], highest))


def unpack_log_probs(
    log_probs: Float[Array, "B H N"], position: Int[Array, " B"], block_size: int
) -> Float[Array, "B H N"]:
    """Return the largest log-probabilities of a state before the token at `position`; MASKED_LOGIT where there is none.

    Args:
        log_probs: Largest log-probabilities as stored in a state.
        position: Position of the next token.
        block_size: Tokens of a block besides its landmark.
    """
    size = block_size + 1
    stored = (jnp.arange(log_probs.shape[2])[None] < position[:, None] // size) & (position % size > 0)[:, None]
    return jnp.where(stored[:, None], log_probs, MASKED_LOGIT)


def pack_log_probs(log_probs: Float[Array, "B H N"]) -> Float[Array, "B H N"]:
    """Return the largest log-probabilities as stored in a state: 0 where there is none."""
    return jnp.where(log_probs > MASKED_LOGIT / 2, log_probs, 0)


def select_blocks(
    ranking: Float[Array, "B C H M"],
    block_index: Int[Array, "B M"],
    positions: Int[Array, "B C"],
    block_size: int,
    retrieval: BlockRetrieval,
) -> SelectedBlocks:
    """Select the blocks with the k largest log-probabilities.

    Args:
        ranking: Log-probabilities of the blocks.
        block_index: Index of each block in its document.
        positions: Positions of the queries within documents.
        block_size: Tokens of a block besides its landmark.
        retrieval: Number and selection of the blocks.
    """
    size, count = block_size + 1, ranking.shape[-1]
    if retrieval.selection_scope == "token":
        ranking = ranking.max(axis=2, keepdims=True)
    values, index = jax.lax.top_k(ranking, min(retrieval.top_k, count))
    threshold = math.log(retrieval.min_probability) if retrieval.min_probability > 0 else MASKED_LOGIT / 2
    index = jnp.sort(jnp.where(values >= threshold, index, count), axis=-1)
    row = jnp.arange(block_index.shape[0])[:, None, None, None]
    selected_index = block_index[row, jnp.minimum(index, count - 1)]
    if retrieval.position_mode == "exact":
        return SelectedBlocks(index, positions[:, :, None, None] - selected_index * size)
    return SelectedBlocks(
        index, compressed_distances(selected_index, index < count, positions[:, :, None, None], size, retrieval.top_k)
    )


def compressed_distances(
    block_index: Int[Array, "... N"],
    selected: Bool[Array, "... N"],
    position: Int[Array, "... 1"],
    size: int,
    top_k: int,
) -> Int[Array, "... N"]:
    """Return the compressed distances of the selected blocks from a query.

    Args:
        block_index: Index of each block in its document, in temporal order.
        selected: False for entries without a block.
        position: Position of the query.
        size: Tokens of a block, including its landmark.
        top_k: Upper bound of the selected blocks.
    """
    block = position // size
    places = jnp.minimum(block, top_k + 1)
    order = jnp.broadcast_to(jnp.arange(block_index.shape[-1]), block_index.shape)
    from_right = selected.sum(axis=-1, keepdims=True) - order
    blocks_back = jnp.where(block_index >= block - top_k, from_right, places - order)
    return position % size + blocks_back * size
