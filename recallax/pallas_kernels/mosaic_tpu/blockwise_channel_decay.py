"""Decays per channel of the key in kernels for TPUs, and which decay a chunk has.

exp(L_i - L_j) differs from channel to channel, so it goes inside the scores. A chunk is cut into blocks of 16 rows.
Scores against earlier blocks meet at the start of the query's block, both sides decayed towards it; those within a
block are computed key by key. Every exponent is a sum of log-decays taken outwards from there: never positive, and no
digits cancel. Source: secondary chunking, GLA (Yang et al. 2023, arXiv 2312.06635), section 4.3.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.mosaic_tpu.chunk_scan import dot, dot_nt, dot_tn
from recallax.pallas_kernels.mosaic_tpu.token_decay import MAX_LOG_DECAY, ChunkDecay, no_decay, token_decay

BLOCK_ROWS = 16
SUBLANES = 8
"""Rows of a register of float32."""


def channel_decay(log_decay: Float[Array, "C K"]) -> ChunkDecay:
    """From the log-decays themselves, at least -FORGET."""
    row, column = _indices(log_decay.shape[0])
    same = row // BLOCK_ROWS == column // BLOCK_ROWS
    # From the start of each row's block to the row, and from the row to the block's end.
    since, rest = _masked_sums(same & (column <= row), log_decay), _masked_sums(same & (column > row), log_decay)
    blocks = [since[end - 1 : end] for end in range(BLOCK_ROWS, since.shape[0] + 1, BLOCK_ROWS)]
    earlier = [sum(blocks[:i], jnp.zeros_like(blocks[0])) for i in range(len(blocks) + 1)]
    later = [sum(blocks[i + 1 :], jnp.zeros_like(blocks[0])) for i in range(len(blocks))]

    def scores(x: Array, y: Array, dtype: DTypeLike) -> Array:
        between = _across_blocks(x * jnp.exp(since), y, rest, blocks, dtype)
        return between + _within_blocks(x, y, log_decay)

    from_start, until_end = since + _broadcast_to_blocks(earlier[:-1]), rest + _broadcast_to_blocks(later)
    return ChunkDecay(scores, jnp.exp(from_start), jnp.exp(until_end), jnp.exp(earlier[-1]).T)


def chunk_decay(log_decays: tuple[Array, ...], length: int, width: int) -> ChunkDecay:
    """Of no gates, of the `running` sums [2, C] of one per token, or of one per channel [C, K]."""
    if not log_decays:
        return no_decay(length)
    (gate,) = log_decays
    return token_decay(gate, width) if gate.shape[0] == 2 else channel_decay(gate)


def _indices(length: int) -> tuple[Int[Array, "C C"], Int[Array, "C C"]]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return row, column


def _masked_sums(which: Bool[Array, "C C"], x: Float[Array, "C K"]) -> Float[Array, "C K"]:
    """For each row the sum of those rows of x that its mask names."""
    return dot(jnp.where(which, 1.0, 0.0).astype(jnp.float32), x, jnp.float32)


def _broadcast_to_blocks(block_log_decays: list[Float[Array, "1 K"]]) -> Float[Array, "C K"]:
    """What belongs to a block in all of its rows."""
    return jnp.concatenate([jnp.broadcast_to(x, (BLOCK_ROWS, x.shape[1])) for x in block_log_decays])


def _across_blocks(
    queries: Float[Array, "C K"],
    y: Float[Array, "C K"],
    log_decay_to_block_end: Float[Array, "C K"],
    block_log_decays: list[Float[Array, "1 K"]],
    dtype: DTypeLike,
) -> Float[Array, "C C"]:
    """queries: decayed from the start of their block. rest: the log-decay from a key to the end of its block."""
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
    """Block by block, since one fits into registers."""
    bands = []
    for start in range(0, x.shape[0], BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        bands.append(_block_scores(x[here], y[here], log_decay[here], start, x.shape[0]))
    return jnp.concatenate(bands)


def _block_scores(
    x: Float[Array, "R K"], y: Float[Array, "R K"], log_decay: Float[Array, "R K"], start: int, length: int
) -> Float[Array, "R C"]:
    """Key by key, from the last to the first; `gap` is the log-decay from there to each row."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK_ROWS, length), axis) for axis in (0, 1))
    inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    gap, scores = jnp.zeros_like(x), jnp.zeros((BLOCK_ROWS, length), jnp.float32)
    for j in reversed(range(BLOCK_ROWS)):
        sums = jnp.sum(x * y[j : j + 1] * jnp.exp(gap), axis=1, keepdims=True)
        scores = scores + jnp.where((column == start + j) & (row >= j), sums, 0)
        gap = jnp.where(inside >= j, gap + log_decay[j : j + 1], 0)
    return scores


def channel_suffix_sums(
    values: Float[Array, "C K"], next_sum: Float[Array, "1 K"], log_decay: Float[Array, "C K"]
) -> tuple[Float[Array, "C K"], Float[Array, "1 K"]]:
    """As of `mosaic_tpu_decay`, up to where all channels forget everything."""
    row, column = _indices(values.shape[0])
    forgets = jnp.where(jnp.max(log_decay, axis=1, keepdims=True) <= 1 - MAX_LOG_DECAY, 1.0, 0.0).astype(jnp.float32)
    # How many tokens up to each one forget everything, as columns and as rows.
    forgets = jnp.broadcast_to(forgets, row.shape)
    count = _masked_sums(column <= row, forgets)
    reaches = (count == dot_tn(forgets, jnp.where(row <= column, 1.0, 0.0), jnp.float32)) & (column >= row)
    at_start, at_end = count[:, :1] == 0, count[:, :1] == count[-1:, :1]
    earlier = jnp.sum(jnp.where(at_start, values, 0), axis=0, keepdims=True)
    whole = (count[-1:, :1] == 0).astype(jnp.float32)
    return _masked_sums(reaches, values) + jnp.where(at_end, next_sum, 0), earlier + next_sum * whole
