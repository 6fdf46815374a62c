"""The gradients of the exact linear memory on Hopper after both walks: each chunk for itself, 64 channels at a time.

With U given, a chunk is the function (`mosaic_gpu_walks.py`)

    O = sum_m b_m Q S_m + (G * Q K^T) U          V - U = sum_m a_m K S_m + (G- * K K^T) U
    S_0' = b_0C S_0 + b_1C S_1 + K^T (c_0 U)     S_1' = stays_C S_1 + K^T (c_1 U)

of everything else, whose slopes are dO, -dV and dS'.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.delta_rule.mosaic_gpu.backward import CHANNEL_TILE, launch_chunk_grads
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_ROW,
    broadcast_per_row,
    load_smem_f32,
    load_vector,
    wgmma_accumulate,
    zero_accumulator,
)

CHUNK_SHAPE, CHANNEL_TILE_SHAPE = (CHUNK, CHUNK), (CHUNK, CHANNEL_TILE)

type StateCoefficients = tuple[Float[Array, "B H T"], ...]
type ChunkStates = tuple[Float[Array, "B H N K V"], ...]
"""Of each state."""


class ChunkCoefficients(NamedTuple):
    """What tokens weigh with; of vectors one per state, the momentum's last."""

    update_to_query: Float[Array, "B H T C"]
    """G: gradients of the chunk's tokens, as queries meet them."""
    update_to_key: Float[Array, "B H T C"]
    """G-: as later gradients do."""
    state_to_key: StateCoefficients
    state_to_query: StateCoefficients
    update_to_end: StateCoefficients
    momentum_decay: StateCoefficients

    def vectors(self) -> StateCoefficients:
        """In the order of `mosaic_gpu_walks.Vectors`."""
        return *self.state_to_key, *self.state_to_query, *self.update_to_end, *self.momentum_decay


def memory_chunk_grads(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"], Float[Array, "B T H V"]],
    states: tuple[ChunkStates, ChunkStates],
    coefficients: ChunkCoefficients,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], ChunkCoefficients]:
    """Of q, k and the weights. values: dO, U and dV; states: S and dS'."""
    vectors, count = (
        (*coefficients.state_to_key, *coefficients.state_to_query, *coefficients.update_to_end),
        len(states[0]),
    )
    chunk = functools.partial(_chunk_grads, interpret)
    sums = ((CHUNK,),) * 2 + ((),) * (5 * count - 1)
    given = coefficients.update_to_query, coefficients.update_to_key, *vectors
    dq, dk, sums = launch_chunk_grads(chunk, q, k, values, (*states[0], *states[1]), given, sums, interpret=interpret)
    now, before, *sums = (jnp.sum(x, axis=2) for x in sums)
    finds, reads, leaves, ends = (sums[i : i + count] for i in range(0, 4 * count, count))
    reads = (x + _sum_at_chunk_end(end) for x, end in zip(reads, ends, strict=True))
    stays = (_sum_at_chunk_end(x) for x in sums[4 * count :])
    return dq, dk, ChunkCoefficients(now, before, tuple(finds), tuple(reads), tuple(leaves), tuple(stays))


def _sum_at_chunk_end(x: Float[Array, "B H T"]) -> Float[Array, "B H T"]:
    """The sum of each chunk at its last token."""
    sums = jnp.sum(x.reshape(*x.shape[:2], -1, CHUNK), axis=3, keepdims=True)
    return jnp.pad(sums, ((0, 0),) * 3 + ((CHUNK - 1, 0),)).reshape(x.shape)


def _chunk_grads(interpret, qk, value_tiles, state_tiles, coefficients, coefficient_grads, pair_scratch, staged):
    """As of `launch_chunk_grads`; the slopes of what moves the states are per channel and not per token."""
    (q, k), (grad, new, slope) = ([x.at[i] for i in range(x.shape[0])] for x in (qk, value_tiles))
    squares, vectors, squares_out, sums_out = (
        coefficients[:2],
        coefficients[2:],
        coefficient_grads[:2],
        coefficient_grads[2:],
    )
    count = len(vectors) // 3
    states, late = ([state_tiles.at[i + n] for i in range(count)] for n in (0, count))
    finds, reads, leaves = (range(i, i + count) for i in range(0, 3 * count, count))
    for i, (slope_here, tokens, sign) in enumerate(((grad, q, 1.0), (slope, k, -1.0))):
        pair, alike = wgmma_accumulate(
            (zero_accumulator(*CHUNK_SHAPE), (slope_here, new.transpose((1, 0)))),
            (zero_accumulator(*CHUNK_SHAPE), (tokens, k.transpose((1, 0)))),
            interpret=interpret,
        )
        pair *= sign
        squares_out[i][...] = pair * alike
        pair_scratch.at[i][...] = (pair * load_vector(squares[i], WGMMA)).astype(pair_scratch.dtype)
    plgpu.commit_smem()

    def through(total, x, matrices, tokens, which, sign):
        """Add x S_m^T, their rows weighed, and leave what each weight is owed."""
        for state, i in zip(matrices, which, strict=True):
            (part,) = wgmma_accumulate(
                (zero_accumulator(*CHANNEL_TILE_SHAPE), (x, state.transpose((1, 0)))), interpret=interpret
            )
            part *= sign
            sums_out[i][...] = jnp.sum(load_smem_f32(tokens) * part, axis=1)
            total += part * broadcast_per_row(load_vector(vectors[i], WGMMA_ROW), CHANNEL_TILE_SHAPE)
        return total

    dq = through(zero_accumulator(*CHANNEL_TILE_SHAPE), grad, states, q, reads, 1.0)
    (dq,) = wgmma_accumulate((dq, (pair_scratch.at[0], k)), interpret=interpret)
    staged.at[0][...] = dq.astype(staged.dtype)
    dk = through(zero_accumulator(*CHANNEL_TILE_SHAPE), slope, states, k, finds, -1.0)
    dk = through(dk, new, late, k, leaves, 1.0)
    products = (
        (pair_scratch.at[0].transpose((1, 0)), q),
        (pair_scratch.at[1], k),
        (pair_scratch.at[1].transpose((1, 0)), k),
    )
    (dk,) = wgmma_accumulate((dk, *products), interpret=interpret)
    staged.at[1][...] = dk.astype(staged.dtype)
    moved = [(state, late[0]) for state in states] + [*zip(states, late, strict=True)][1:]
    for out, (state, after) in zip(sums_out[3 * count :], moved, strict=True):
        out[...] = jnp.sum(load_smem_f32(state) * load_smem_f32(after), axis=1)
