"""The gradients of the delta rule on Hopper after both walks: each chunk for itself, 64 channels of keys at a time.

With S the state before the chunk, dS the gradient of that behind it, U and dW as in `walks.py`, D_ij = 2^(L_i - L_j)
for j <= i, and D' the same for j < i,

    dQ = scale (2^L dO S^T + (dO U^T * D) K)
    R  = 2^L dW S^T + (dW U^T * D') K                       what erasing read; b's gradient is -k.R
    dK = -b R + 2^(L_C - L) U dS^T + scale (dO U^T * D)^T Q - (dW U^T * D')^T (b K)

What passes from before a token to readers from it on is scaled by its decay: that gradient is the sum over the rest of
the chunk of q.dq - k.(b R) - k.(what else is in dk), and of what the chunk leaves behind, dS.(2^L_C S) and
k.(2^(L_C - L) U dS^T).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    launch_kernel,
    load_smem_f32,
    load_vector,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

CHANNEL_TILE = 64
"""Channels of a block: the sums over channels are partial ones."""


class DeltaChunkGrads(NamedTuple):
    """Sums over channels are one per part of them."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    erase: Float[Array, "B H P T"]
    decay_in_chunk: Float[Array, "B H P T"]
    """What readers from a token on owe to its past: the sum from there to the chunk's end is the decay's gradient."""
    decay_at_chunk_end: Float[Array, "B H P T"]
    """What a chunk leaves behind: the sum over the chunk is in all of its decays' gradients."""


def delta_chunk_grads(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"], Float[Array, "B T H V"]],
    states: tuple[Float[Array, "B H N K V"], Float[Array, "B H N K V"]],
    gates: CumulativeDecay | None,
    erase: Float[Array, "B H T"],
    scale: float,
    *,
    interpret: bool,
) -> DeltaChunkGrads:
    """Per value head. values: dO, U and dW; states: S and dS. Without gates there are no sums for the decay."""

    def chunk(keys, wide, held, vectors, sums_out, pairs, staged):
        parts, sums = _chunk_grads(keys, wide, held, vectors, pairs, scale, interpret)
        for i, x in enumerate(parts):
            staged.at[i][...] = x.astype(staged.dtype)
        for target, x in zip(sums_out, sums, strict=True):
            target[...] = x

    count = 1 if gates is None else 3
    dq, dk, sums = launch_chunk_grads(
        chunk, q, k, values, states, (*(gates or ()), erase), ((),) * count, interpret=interpret
    )
    return DeltaChunkGrads(dq, dk, *sums, *((None,) * (3 - count)))


def launch_chunk_grads(
    chunk: Callable[..., None],
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    values: tuple[Float[Array, "B T H V"], ...],
    states: tuple[Float[Array, "B H N K V"], ...],
    weights: tuple[Float[Array, "B H T ..."], ...],
    channel_sums: tuple[tuple[int, ...], ...],
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], tuple[Float[Array, "B H P T ..."], ...]]:
    """Gradients of queries and keys, and sums over channels of each part, so wide per token.

    Calls chunk(keys, wide, held, weights, sums, pairs, staged) in a block of threads for each chunk and part of the
    channels: q and k, values, and states in shared memory, weights and sums in global memory, room for two matrices of
    pairs of tokens, and where it leaves both gradients.
    """
    (b, t, groups, width), (h, columns) = q.shape, values[0].shape[2:]

    def gradients(q, k, values, states, weights, dq, dk, sums):
        row, head, part, n = (lax.axis_index(name) for name in ("row", "head", "part", "chunk"))
        time, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(part * CHANNEL_TILE, CHANNEL_TILE)

        def scoped(keys, wide, held, pairs, staged, arrived):
            group = lax.div(head, jnp.int32(h // groups))
            for i, x in enumerate((q, k)):
                plgpu.copy_gmem_to_smem(x.at[row, time, group, channels], keys.at[i], arrived)
            for i, x in enumerate(values):
                plgpu.copy_gmem_to_smem(x.at[row, time, head], wide.at[i], arrived)
            for i, x in enumerate(states):
                plgpu.copy_gmem_to_smem(x.at[row, head, n, channels], held.at[i], arrived)
            plgpu.barrier_wait(arrived)
            here = [x.at[row, head, time] for x in weights], [x.at[row, head, part, time] for x in sums]
            chunk(keys, wide, held, *here, pairs, staged)
            plgpu.commit_smem()
            copy_smem_to_gmem(*((staged.at[i], x.at[row, time, head, channels]) for i, x in enumerate((dq, dk))))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(2, CHUNK, CHANNEL_TILE, tile=64),
            smem_matrix(len(values), CHUNK, columns, tile=64),
            smem_matrix(len(states), CHANNEL_TILE, columns, tile=64),
            smem_matrix(2, CHUNK, CHUNK, tile=64),
            smem_matrix(2, CHUNK, CHANNEL_TILE, tile=64),
            plgpu.Barrier(num_arrivals=2 + len(values) + len(states)),
        )

    wide = jax.ShapeDtypeStruct((b, t, h, width), q.dtype)
    return launch_kernel(
        gradients,
        out_type=(
            wide,
            wide,
            tuple(jax.ShapeDtypeStruct((b, h, width // CHANNEL_TILE, t, *x), jnp.float32) for x in channel_sums),
        ),
        grid={"row": b, "head": h, "part": width // CHANNEL_TILE, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(q, k, values, states, weights)


def _chunk_grads(qk, value_tiles, state_tiles, vectors, pair_scratch, scale, interpret):
    """dq and dk, and the sums over channels. pairs: room for what queries and erasers have of each key."""
    (q, k), (grad, new, slope), (state, late) = (
        [x.at[i] for i in range(x.shape[0])] for x in (qk, value_tiles, state_tiles)
    )
    square, shape = (CHUNK, CHUNK), (CHUNK, CHANNEL_TILE)
    *gates, erase = vectors
    reads, erases = wgmma_accumulate(
        (zero_accumulator(*square), (grad, new.transpose((1, 0)))),
        (zero_accumulator(*square), (slope, new.transpose((1, 0)))),
        interpret=interpret,
    )
    i, j = row_and_column_iota(square)
    reads, erases = jnp.where(i >= j, reads * scale, 0.0), jnp.where(i > j, erases, 0.0)
    strength = load_vector(erase, WGMMA_ROW)
    since: Any = None
    left: Any = None
    last: Any = None
    if gates:
        rows = load_vector(gates[0], WGMMA_ROW)
        gap = broadcast_per_row(rows, square) - broadcast_per_column(load_vector(gates[1], WGMMA_COL), square)
        decay = jnp.exp2(jnp.where(i >= j, gap, -jnp.inf))
        reads, erases = reads * decay, erases * decay
        last = plgpu.load(gates[0].at[CHUNK - 1])
        since, left = jnp.exp2(rows), jnp.exp2(last - load_vector(gates[1], WGMMA_ROW))
    pair_scratch.at[0][...] = reads.astype(pair_scratch.dtype)
    (alike,) = wgmma_accumulate((zero_accumulator(*square), (k, k.transpose((1, 0)))), interpret=interpret)
    erase_sum = jnp.sum(erases * alike, axis=1)
    pair_scratch.at[1][...] = (erases * broadcast_per_row(-strength, square)).astype(pair_scratch.dtype)
    plgpu.commit_smem()

    def scaled(x, *factors):
        for factor in factors:
            x = x if factor is None else x * broadcast_per_row(factor, shape)
        return x

    def dots(x, y):
        return jnp.sum(load_smem_f32(x) * y, axis=1)

    def product_at_end():
        return jnp.exp2(last) * jnp.sum(load_smem_f32(state) * load_smem_f32(late), axis=1)

    # For wide states registers suffice only after the sums, for narrow ones only before.
    ends: Any = product_at_end() if gates and state.shape[1] == CHANNEL_TILE else None
    (dq,) = wgmma_accumulate((zero_accumulator(*shape), (grad, state.transpose((1, 0)))), interpret=interpret)
    (dq,) = wgmma_accumulate((scaled(dq * scale, since), (pair_scratch.at[0], k)), interpret=interpret)
    through: Any = dots(q, dq) if gates else None
    dq = dq.astype(q.dtype)
    reader, key = wgmma_accumulate(
        (zero_accumulator(*shape), (slope, state.transpose((1, 0)))),
        (zero_accumulator(*shape), (new, late.transpose((1, 0)))),
        interpret=interpret,
    )
    reader, key = scaled(reader, since), scaled(key, left)
    erase_sum = -(erase_sum + dots(k, reader))
    behind: Any = dots(k, key) if gates else None
    reader, key = wgmma_accumulate(
        (scaled(reader, -strength), (pair_scratch.at[1], k)),
        (key, (pair_scratch.at[0].transpose((1, 0)), q), (pair_scratch.at[1].transpose((1, 0)), k)),
        interpret=interpret,
    )
    if not gates:
        return (dq, reader + key), (erase_sum,)
    through += dots(k, reader) - dots(k, key)
    behind += product_at_end() if ends is None else ends
    return (dq, reader + key), (erase_sum, through, behind)
