"""Gradients of the linear memory after both loops: every chunk is independent, 64 channels at a time.

With U given, a chunk is the function (`memory_chunk_loops.py`)

    O = sum_m b_m Q S_m + (G * Q K^T) U          V - U = sum_m a_m K S_m + (G- * K K^T) U
    S_0' = b_0C S_0 + b_1C S_1 + K^T (c_0 U)     S_1' = decay_C S_1 + K^T (c_1 U)

of all other inputs. The gradients of its left sides are dO, -dV and dS'.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.chunk_grads import (
    TILE_SHAPE,
    ChunkGradInputs,
    ChunkGradRefs,
    launch_chunk_grads,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    WGMMA_ROW,
    broadcast_per_row,
    load_smem_f32,
    load_vector,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.neural_memory.mosaic_gpu.memory_chunk_loops import ChunkCoefficients

type ChunkStates = tuple[Float[Array, "B H N K V"], ...]
"""Each state of all chunks."""


def memory_chunk_grads(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"], Float[Array, "B T H V"]],
    states: tuple[ChunkStates, ChunkStates],
    coefficients: ChunkCoefficients,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], ChunkCoefficients]:
    """Compute the gradients of queries, keys and coefficients.

    Args:
        q: Queries.
        k: Keys.
        values: dO, U and dV.
        states: S before and dS' after each chunk.
        coefficients: Coefficients of the forward pass.
    """
    count = len(states[0])
    vectors = (*coefficients.state_to_key, *coefficients.state_to_query, *coefficients.update_to_end)
    weights = coefficients.update_to_query, coefficients.update_to_key, *vectors
    inputs = ChunkGradInputs(q, k, values, (*states[0], *states[1]), weights)
    # Sums: two matrices, three vectors per state, and the products of states: one per state and the momentum's own.
    sums = ((CHUNK,),) * 2 + ((),) * (5 * count - 1)
    dq, dk, sums = launch_chunk_grads(_chunk_grads, inputs, sums)
    update_to_query, update_to_key, *sums = (jnp.sum(x, axis=2) for x in sums)
    state_to_key, state_to_query, update_to_end, at_end = (sums[i : i + count] for i in range(0, 4 * count, count))
    state_to_query = (x + _sum_at_chunk_end(end) for x, end in zip(state_to_query, at_end, strict=True))
    momentum_decay = (_sum_at_chunk_end(x) for x in sums[4 * count :])
    grads = tuple(state_to_key), tuple(state_to_query), tuple(update_to_end), tuple(momentum_decay)
    return dq, dk, ChunkCoefficients(update_to_query, update_to_key, *grads)


def _sum_at_chunk_end(x: Float[Array, "B H T"]) -> Float[Array, "B H T"]:
    """Return the sum over each chunk at its last token, and 0 elsewhere."""
    sums = jnp.sum(x.reshape(*x.shape[:2], -1, CHUNK), axis=3, keepdims=True)
    return jnp.pad(sums, ((0, 0),) * 3 + ((CHUNK - 1, 0),)).reshape(x.shape)


def _chunk_grads(refs: ChunkGradRefs) -> None:
    """Compute the gradients of one tile of channels of one chunk.

    The sums for the coefficients that move the states are per channel, and not per token.
    """
    (q, k), (out_grad, updates, v_grad) = ([x.at[i] for i in range(x.shape[0])] for x in (refs.qk, refs.values))
    vectors, vector_sums = refs.weights[2:], refs.sums[2:]
    count = len(vectors) // 3
    states, state_grads = ([refs.states.at[i + n] for i in range(count)] for n in (0, count))
    state_to_key, state_to_query, update_to_end = (range(i, i + count) for i in range(0, 3 * count, count))
    _store_pair_grads(refs, ((out_grad, q, 1.0), (v_grad, k, -1.0)), updates, k)

    def add_products(total, x, matrices, tokens, indices, sign):
        """Add x S_m^T with weighted rows, and store the sums for the gradient of each weight."""
        for matrix, i in zip(matrices, indices, strict=True):
            (product,) = wgmma_accumulate((zero_accumulator(*TILE_SHAPE), (x, matrix.transpose((1, 0)))))
            product *= sign
            vector_sums[i][...] = jnp.sum(load_smem_f32(tokens) * product, axis=1)
            total += product * broadcast_per_row(load_vector(vectors[i], WGMMA_ROW), TILE_SHAPE)
        return total

    dq = add_products(zero_accumulator(*TILE_SHAPE), out_grad, states, q, state_to_query, 1.0)
    (dq,) = wgmma_accumulate((dq, (refs.pairs.at[0], k)))
    refs.grads.at[0][...] = dq.astype(refs.grads.dtype)
    dk = add_products(zero_accumulator(*TILE_SHAPE), v_grad, states, k, state_to_key, -1.0)
    dk = add_products(dk, updates, state_grads, k, update_to_end, 1.0)
    products = (
        (refs.pairs.at[0].transpose((1, 0)), q),
        (refs.pairs.at[1], k),
        (refs.pairs.at[1].transpose((1, 0)), k),
    )
    (dk,) = wgmma_accumulate((dk, *products))
    refs.grads.at[1][...] = dk.astype(refs.grads.dtype)
    state_pairs = [(state, state_grads[0]) for state in states] + [*zip(states, state_grads, strict=True)][1:]
    for target, (state, state_grad) in zip(vector_sums[3 * count :], state_pairs, strict=True):
        target[...] = jnp.sum(load_smem_f32(state) * load_smem_f32(state_grad), axis=1)


def _store_pair_grads(refs: ChunkGradRefs, sides, updates, k) -> None:
    """Store the gradients of G and G- and the gradients of the scores of queries and of keys.

    sides: (gradient of the values, tokens, sign) of each.
    """
    for i, (value_grad, tokens, sign) in enumerate(sides):
        pair_grads, scores = wgmma_accumulate(
            (zero_accumulator(*CHUNK_SHAPE), (value_grad, updates.transpose((1, 0)))),
            (zero_accumulator(*CHUNK_SHAPE), (tokens, k.transpose((1, 0)))),
        )
        pair_grads *= sign
        refs.sums[i][...] = pair_grads * scores
        refs.pairs.at[i][...] = (pair_grads * load_vector(refs.weights[i], WGMMA)).astype(refs.pairs.dtype)
    plgpu.commit_smem()
