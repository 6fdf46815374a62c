"""Decay per key channel in the TPU kernels, and the choice of the decay of a chunk.

exp(L_i - L_j) differs between channels, so it is part of the scores. A chunk is split into blocks of 16 rows. For
scores against earlier blocks, query and key both decay to the start of the query's block; scores within a block are
computed key by key. Every exponent is a sum of log-decays from that point outwards, which is never positive and has no
cancellation. Source: secondary chunking, GLA (Yang et al. 2023, arXiv 2312.06635), section 4.3.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_nt, dot_tn
from recallax.pallas_kernels.mosaic_tpu.token_decay import MAX_LOG_DECAY, ChunkDecay, no_decay, token_decay

BLOCK_ROWS = 16
"""Rows of a block: a whole bfloat16 tile, and [BLOCK_ROWS, 128] float32 values fit into registers."""


def channel_decay(log_decay: Float[Array, "C K"]) -> ChunkDecay:
    """Return the `ChunkDecay` of log-decays per channel, clipped to -MAX_LOG_DECAY."""
    row, column = _indices(log_decay.shape[0])
    same = row // BLOCK_ROWS == column // BLOCK_ROWS
    # Log-decay from the start of each row's block to the row, and from the row to the end of the block.
    from_block_start = _masked_sums(same & (column <= row), log_decay)
    to_block_end = _masked_sums(same & (column > row), log_decay)
    blocks = [from_block_start[end - 1 : end] for end in range(BLOCK_ROWS, log_decay.shape[0] + 1, BLOCK_ROWS)]
    earlier = [sum(blocks[:i], jnp.zeros_like(blocks[0])) for i in range(len(blocks) + 1)]
    later = [sum(blocks[i + 1 :], jnp.zeros_like(blocks[0])) for i in range(len(blocks))]

    def scores(x: Array, y: Array, dtype: DTypeLike) -> Array:
        between = _across_blocks(x * jnp.exp(from_block_start), y, to_block_end, blocks, dtype)
        return between + _within_blocks(x, y, log_decay)

    from_start = from_block_start + _broadcast_to_blocks(earlier[:-1])
    to_end = to_block_end + _broadcast_to_blocks(later)
    return ChunkDecay(scores, jnp.exp(from_start), jnp.exp(to_end), jnp.exp(earlier[-1]).T)


def chunk_decay(log_decays: tuple[Array, ...], length: int, width: int) -> ChunkDecay:
    """Return the decay of a chunk.

    Args:
        log_decays: Empty for no decay; else one array: the `running_sums` [2, C] of a decay per token, or the
            log-decay per channel [C, K].
        length: Tokens of the chunk C.
        width: Width of the factors of a decay per token.
    """
    if not log_decays:
        return no_decay(length)
    (gate,) = log_decays
    return token_decay(gate, width) if gate.shape[0] == 2 else channel_decay(gate)


def _indices(length: int) -> tuple[Int[Array, "C C"], Int[Array, "C C"]]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return row, column


def _masked_sums(mask: Bool[Array, "C C"], x: Float[Array, "C K"]) -> Float[Array, "C K"]:
    """For each row of the mask, sum the rows of x where it is True."""
    return dot(jnp.where(mask, 1.0, 0.0).astype(jnp.float32), x, jnp.float32)


def _broadcast_to_blocks(block_log_decays: list[Float[Array, "1 K"]]) -> Float[Array, "C K"]:
    """Repeat the row of each block for all rows of the block."""
    return jnp.concatenate([jnp.broadcast_to(x, (BLOCK_ROWS, x.shape[1])) for x in block_log_decays])


def _across_blocks(
    queries: Float[Array, "C K"],
    y: Float[Array, "C K"],
    log_decay_to_block_end: Float[Array, "C K"],
    block_log_decays: list[Float[Array, "1 K"]],
    dtype: DTypeLike,
) -> Float[Array, "C C"]:
    """Scores against the keys of earlier blocks.

    Args:
        queries: Queries, decayed from the start of their block.
        y: Keys.
        log_decay_to_block_end: Log-decay from each key to the end of its block.
        block_log_decays: Total log-decay of each block.
        dtype: Dtype of the operands of products.
    """
    length = y.shape[0]
    bands, keys = [jnp.zeros((BLOCK_ROWS, length), jnp.float32)], log_decay_to_block_end[:BLOCK_ROWS]
    for start in range(BLOCK_ROWS, length, BLOCK_ROWS):
        if start > BLOCK_ROWS:
            keys = jnp.concatenate(
                [keys + block_log_decays[start // BLOCK_ROWS - 1], log_decay_to_block_end[start - BLOCK_ROWS : start]]
            )
        decayed = jnp.concatenate([y[:start] * jnp.exp(keys), jnp.zeros_like(y[start:])])
        bands.append(dot_nt(queries[start : start + BLOCK_ROWS], decayed, dtype))
    return jnp.concatenate(bands)


def _within_blocks(x: Float[Array, "C K"], y: Float[Array, "C K"], log_decay: Float[Array, "C K"]) -> Array:
    """Scores within each block of rows; the working set of one block fits into registers."""
    bands = []
    for start in range(0, x.shape[0], BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        bands.append(_block_scores(x[rows], y[rows], log_decay[rows], start, x.shape[0]))
    return jnp.concatenate(bands)


def _block_scores(
    x: Float[Array, "R K"], y: Float[Array, "R K"], log_decay: Float[Array, "R K"], start: int, length: int
) -> Float[Array, "R C"]:
    """Scores of one block, key by key from the last; `log_decay_from_key` runs from the key to each row."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK_ROWS, length), axis) for axis in (0, 1))
    inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    log_decay_from_key, scores = jnp.zeros_like(x), jnp.zeros((BLOCK_ROWS, length), jnp.float32)
    for j in reversed(range(BLOCK_ROWS)):
        sums = jnp.sum(x * y[j : j + 1] * jnp.exp(log_decay_from_key), axis=1, keepdims=True)
        scores = scores + jnp.where((column == start + j) & (row >= j), sums, 0)
        log_decay_from_key = jnp.where(inside >= j, log_decay_from_key + log_decay[j : j + 1], 0)
    return scores


def channel_suffix_sums(
    values: Float[Array, "C K"], next_sum: Float[Array, "1 K"], log_decay: Float[Array, "C K"]
) -> tuple[Float[Array, "C K"], Float[Array, "1 K"]]:
    """Sum `values` over each token and its successors up to the next document start, per channel.

    Args:
        values: One value per token and channel.
        next_sum: The same sum for the first token of the next chunk.
        log_decay: Log-decay per channel; all channels are -MAX_LOG_DECAY where a document starts.

    Returns:
        The sums of the chunk's tokens, and the `next_sum` of the previous chunk.
    """
    row, column = _indices(values.shape[0])
    starts = jnp.where(jnp.max(log_decay, axis=1, keepdims=True) <= 1 - MAX_LOG_DECAY, 1.0, 0.0).astype(jnp.float32)
    # Number of document starts up to each token, as columns and as rows.
    starts = jnp.broadcast_to(starts, row.shape)
    count = _masked_sums(column <= row, starts)
    summed = (count == dot_tn(starts, jnp.where(row <= column, 1.0, 0.0), jnp.float32)) & (column >= row)
    at_start, at_end = count[:, :1] == 0, count[:, :1] == count[-1:, :1]
    earlier = jnp.sum(jnp.where(at_start, values, 0), axis=0, keepdims=True)
    one_document = (count[-1:, :1] == 0).astype(jnp.float32)
    return _masked_sums(summed, values) + jnp.where(at_end, next_sum, 0), earlier + next_sum * one_document
