"""Decays per channel of the keys: decayed queries, keys and scores of every chunk, before any loop over time.

2^(L_i - L_j) differs from channel to channel, so it is part of the scores' product, and its two factors overflow for
unbounded gates. A chunk of 64 tokens is therefore halved twice: queries of a second half and keys of the first are both
decayed to the border between them, where both factors are at most 1. Blocks of 16 tokens are referred to their middle,
where half of the factors exceed 1; no decay counts as less than 2^-12 there, so that these stay below 2^96. All
exponents are sums of log2-decays from the border outwards, computed as products with matrices of ones, of decays that
are split into two bfloat16 numbers. Source: secondary chunking, GLA (Yang et al. 2023, arXiv 2312.06635), section 4.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import inverse_scratch, store_unit_lower_inverse
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Ref,
    block_index,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    hi_lo_split,
    load_smem_f32,
    load_vector,
    opaque_zero,
    row_and_column_iota,
    shared_group,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

CHANNEL_TILE = 64
"""Channels that are processed together."""
NUM_LEVELS = 3
"""Levels of borders: between halves of 2^5, 2^4 and 2^3 tokens. A loop over them keeps only one in registers."""
MIN_LEVEL = 3
"""Level of the smallest halves. Tokens of one such half also meet each other, at the same border."""
MIN_BLOCK_LOG2_DECAY = -12.0
"""Lower bound of a token's log2-decay where factors may exceed 1: 8 tokens give at most 2^96, below float32's 2^128."""


class DecayedQueriesKeys(NamedTuple):
    """Chunk inputs of every value head."""

    q: Float[Array, "B T H K"]
    """Queries, scaled and decayed since the start of the chunk."""
    k: Float[Array, "B T H K"]
    """Keys, decayed until the end of the chunk."""
    scores: Float[Array, "B H T C"]
    """Scores of each query with the keys of its chunk, scaled and decayed."""


class DecayedEraseKeys(NamedTuple):
    """Chunk inputs of the delta rule, of every value head."""

    erase_k: Float[Array, "B T H K"]
    """Erase keys, decayed since the start of the chunk."""
    inverse: Float[Array, "B H T D"]
    """(I + A)^{-1} as in `triangular_inverse.py`; A are the decayed products of erase keys with earlier keys."""


def decay_queries_keys(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    document_gates: CumulativeDecay | None,
    scale: float,
) -> DecayedQueriesKeys:
    """Decay the queries and keys of every chunk and compute their scores.

    Args:
        q: Queries in bfloat16.
        k: Keys in bfloat16.
        decay: Log2-decay of each token and channel.
        document_gates: Gates of the documents, with one head; None: no document ends.
        scale: Factor of the queries and the scores.
    """

    def finish(scores, scratch, decayed_smem, targets):
        queries, keys, out = targets
        scratch[0][...] = (scores * scale).astype(scratch[0].dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem((decayed_smem.at[0], queries), (decayed_smem.at[1], keys), (scratch[0], out))

    stage = _DecayStage("decayed", scale, 2, CHUNK, [smem_matrix(*CHUNK_SHAPE, tile=CHUNK)], finish)
    return DecayedQueriesKeys._make(_launch_decay_kernel(q, k, decay, document_gates, stage))


def decay_erase_keys(
    erase_k: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    document_gates: CumulativeDecay | None,
) -> DecayedEraseKeys:
    """Decay the erase keys of every chunk and invert its triangular system.

    Args:
        erase_k: Erase keys in bfloat16: keys times erase strengths.
        k: Keys in bfloat16.
        decay: Log2-decay of each token and channel.
        document_gates: Gates of the documents, with one head; None: no document ends.
    """

    def finish(scores, scratch, decayed_smem, targets):
        store_unit_lower_inverse(scores, scratch)
        plgpu.commit_smem()
        copy_smem_to_gmem((decayed_smem.at[0], targets[0]), (scratch[0], targets[1]))

    stage = _DecayStage("erasing", 1.0, 1, 2 * CHUNK, inverse_scratch(), finish)
    return DecayedEraseKeys._make(_launch_decay_kernel(erase_k, k, decay, document_gates, stage))


def chunk_state_decay(
    decay: Float[Array, "B T H K"], document_gates: CumulativeDecay | None
) -> Float[Array, "B H N K"]:
    """Return the decay of the state over each chunk.

    Args:
        decay: Log2-decay of each token and channel.
        document_gates: Gates of the documents, with one head; None: no document ends.
    """
    log2_decay = jnp.sum(decay.reshape(decay.shape[0], -1, CHUNK, *decay.shape[2:]), axis=2)
    if document_gates is not None:
        log2_decay += document_gates.query[:, 0, CHUNK - 1 :: CHUNK, None, None]
    return jnp.moveaxis(jnp.exp2(log2_decay), 2, 1)


class _DecayStage(NamedTuple):
    """The part in which the two launches of the kernel differ."""

    kernel_name: str
    scale: float
    """Factor of the decayed queries."""
    num_decayed_outputs: int
    """Decayed matrices that are stored: queries alone, or queries and keys."""
    out_columns: int
    """Entries per token of the last output."""
    scratch: list[Any]
    """Scratch types of `finish`."""
    finish: Callable[..., None]
    """`finish(scores, scratch, decayed_smem, targets)` stores the outputs of a chunk."""


def _launch_decay_kernel(q, k, decay, document_gates, stage: _DecayStage):
    """Return the decayed matrices and the last output of a stage, per value head."""
    (b, t, _, k_dim), h = q.shape, decay.shape[2]

    def decay_chunk(q, k, decay, document_gates, decayed_out, out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(tokens, decay_smem, level_smem, decayed_smem, scratch, vectors, loaded):
            for n, x in enumerate((q, k)):
                plgpu.copy_gmem_to_smem(x.at[row, time, shared_group(head, h, x.shape[2])], tokens.at[n], loaded)
            gates = copy_document_gates(document_gates, row, time, vectors, loaded)
            plgpu.barrier_wait(loaded)

            def add_channels(tile, scores):
                channels, zero = pl.ds(tile * CHANNEL_TILE, CHANNEL_TILE), opaque_zero(tile)
                x, y = (tokens.at[n, :, channels] for n in range(2))
                store_hi_lo_decay(load_vector(decay.at[row, time, head, channels], WGMMA), decay_smem)
                plgpu.commit_smem()
                scores = _add_level_scores(scores, x, y, decay_smem, level_smem)
                from_start, to_end = chunk_boundary_decay(decay_smem, gates, (CHUNK, CHANNEL_TILE), zero)
                factors = ((x, from_start * stage.scale), (y, to_end))[: stage.num_decayed_outputs]
                for n, (token, factor) in enumerate(factors):
                    decayed_smem.at[n, :, channels][...] = (load_smem_f32(token) * factor).astype(decayed_smem.dtype)
                plgpu.commit_smem()  # all warps have read
                return scores

            scores = lax.fori_loop(0, k_dim // CHANNEL_TILE, add_channels, zero_accumulator(*CHUNK_SHAPE))
            targets = [*(x.at[row, time, head] for x in decayed_out), out.at[row, head, time]]
            stage.finish(mask_across_documents(scores, gates), scratch, decayed_smem, targets)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(2, CHUNK, k_dim, tile=CHANNEL_TILE),
            smem_matrix(4, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(NUM_LEVELS, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(stage.num_decayed_outputs, CHUNK, k_dim, tile=CHANNEL_TILE),
            stage.scratch,
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + len(document_gates)),
        )

    tokens = jax.ShapeDtypeStruct((b, t, h, k_dim), q.dtype)
    decayed, out = launch_kernel(
        decay_chunk,
        name=stage.kernel_name,
        out_type=((tokens,) * stage.num_decayed_outputs, jax.ShapeDtypeStruct((b, h, t, stage.out_columns), q.dtype)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(q, k, decay, document_gates or ())
    return *decayed, out


def _add_level_scores(scores: Array, x: Ref, y: Ref, decay_smem: Ref, level_smem: Ref) -> Array:
    """Add the scores of one tile of channels: the pairs of each level meet at the borders of that level."""

    def meet(step, scores):
        query_factors, key_factors = level_decay_factors(step, decay_smem, (CHUNK, CHANNEL_TILE))
        keys = level_smem.at[step]
        keys[...] = (load_smem_f32(y) * key_factors).astype(keys.dtype)
        plgpu.commit_smem()
        queries = (load_smem_f32(x) * query_factors).astype(keys.dtype)
        (all_pairs,) = wgmma_accumulate((zero_accumulator(*CHUNK_SHAPE), (queries, keys.transpose((1, 0)))))
        return jnp.where(level_mask(step), scores + all_pairs, scores)

    return lax.fori_loop(0, NUM_LEVELS, meet, scores)


def copy_document_gates(document_gates: Sequence[Ref], row: Array, time: Any, scratch: Ref, loaded: Ref) -> list[Ref]:
    """Start to copy the document gates of a chunk to shared memory.

    Args:
        document_gates: References [B, 1, T] in global memory; empty: no gates.
        row: Row of the block.
        time: Slice of the chunk.
        scratch: Reference [2, C] in shared memory.
        loaded: Barrier at which each copy arrives.

    Returns:
        References [C] to the gates of queries and keys.
    """
    for n, gate in enumerate(document_gates):
        plgpu.copy_gmem_to_smem(gate.at[row, 0, time], scratch.at[n], loaded)
    return [scratch.at[n] for n in range(len(document_gates))]


def store_hi_lo_decay(decay: Array, scratch: Ref) -> None:
    """Store log2-decays [C, D] as operands of sums: high and low parts, then those of the bounded decays."""
    parts = (*hi_lo_split(decay), *hi_lo_split(jnp.maximum(decay, MIN_BLOCK_LOG2_DECAY)))
    for n, part in enumerate(parts):
        scratch.at[n][...] = part


def masked_row_sums(mask: Array, hi_lo: tuple[Ref, Ref], shape: tuple[int, int]) -> Array:
    """For each row of the mask, sum the rows of a matrix that it selects.

    Args:
        mask: Boolean [C, C].
        hi_lo: High and low part of the matrix [C, D].
        shape: (C, D).
    """
    ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    (sums,) = wgmma_accumulate((zero_accumulator(*shape), (ones, hi_lo[0]), (ones, hi_lo[1])))
    return sums


def chunk_boundary_decay(
    decay_smem: Ref, gates: list[Ref], shape: tuple[int, int], row_offset: Array | int
) -> tuple[Array, Array]:
    """Return the decay from the start of the chunk to each token, and from each token to the end of the chunk.

    Args:
        decay_smem: Log2-decays of `store_hi_lo_decay`.
        gates: References [C] to the document gates; empty: no gates.
        shape: (C, D).
        row_offset: Argument of `row_and_column_iota`.
    """
    i, t = row_and_column_iota(CHUNK_SHAPE, row_offset)
    hi_lo = decay_smem.at[0], decay_smem.at[1]
    from_start, to_end = (masked_row_sums(mask, hi_lo, shape) for mask in (t <= i, t > i))
    if gates:
        query, key = (plgpu.load(gate, layout=WGMMA_ROW) for gate in gates)
        from_start += broadcast_per_row(query, shape)
        to_end += broadcast_per_row(plgpu.load(gates[0].at[CHUNK - 1]) - key, shape)
    return jnp.exp2(from_start), jnp.exp2(to_end)


def level_decay_factors(step: Array, decay_smem: Ref, shape: tuple[int, int]) -> tuple[Array, Array]:
    """Return the factors of queries and keys that refer them to the borders of a level.

    Args:
        step: 0 for the largest halves.
        decay_smem: Log2-decays of `store_hi_lo_decay`.
        shape: (C, D).
    """
    level = NUM_LEVELS + MIN_LEVEL - 1 - step
    i, t = row_and_column_iota(CHUNK_SHAPE)
    same_half = block_index(i, level) == block_index(t, level)
    mask = same_half & (((half_index(i, level) == 1) & (t <= i)) | ((half_index(i, level) == 0) & (t > i)))
    first = jnp.where(level == MIN_LEVEL, 2, 0)  # bounded decays at the last level
    exponents = masked_row_sums(mask, (decay_smem.at[first], decay_smem.at[first + 1]), shape)
    i, _ = row_and_column_iota(shape)
    beyond = level == MIN_LEVEL  # queries before the border grow towards it, and so do keys after it
    query_exponents = jnp.where((half_index(i, level) == 0) & beyond, -exponents, exponents)
    key_exponents = jnp.where((half_index(i, level) == 1) & beyond, -exponents, exponents)
    return jnp.exp2(query_exponents), jnp.exp2(key_exponents)


def level_mask(step: Array) -> Array:
    """Return the pairs of queries (rows) and keys (columns) [C, C] whose scores a level computes."""
    level = NUM_LEVELS + MIN_LEVEL - 1 - step
    i, j = row_and_column_iota(CHUNK_SHAPE)
    same_pair = block_index(i, level + 1) == block_index(j, level + 1)
    across = block_index(i, level) > block_index(j, level)
    inside = (block_index(i, level) == block_index(j, level)) & (i >= j) & (level == MIN_LEVEL)
    return same_pair & (across | inside)


def mask_across_documents(scores: Array, gates: list[Ref]) -> Array:
    """Set the scores [C, C] of pairs in different documents to 0.

    Args:
        scores: Scores of queries (rows) and keys (columns).
        gates: References [C] to the document gates; empty: no document ends.
    """
    if not gates:
        return scores
    query, key = gates
    log2_decay = broadcast_per_row(plgpu.load(query, layout=WGMMA_ROW), CHUNK_SHAPE) - broadcast_per_column(
        plgpu.load(key, layout=WGMMA_COL), CHUNK_SHAPE
    )
    return scores * jnp.exp2(jnp.minimum(log2_decay, 0.0))


def half_index(index: Array, level: Array) -> Array:
    """Return 0 for tokens of a first half of 2^level tokens, and 1 for tokens of a second half."""
    return lax.bitwise_and(block_index(index, level), 1)
