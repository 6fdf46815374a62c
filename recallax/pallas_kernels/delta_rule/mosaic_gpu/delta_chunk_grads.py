"""Gradients of the delta rule after both loops: every chunk is independent, 64 channels of keys at a time.

With S the state before the chunk, dS the gradient of the state after it, U and dW as in `delta_chunk_loops.py`,
D_ij = 2^(L_i - L_j) for j <= i, and D' the same for j < i,

    dQ = scale (2^L dO S^T + (dO U^T * D) K)
    R  = 2^L dW S^T + (dW U^T * D') K                       gradient of the erase keys b K, negated: db = -k.R
    dK = -b R + 2^(L_C - L) U dS^T + scale (dO U^T * D)^T Q - (dW U^T * D')^T (b K)

The decay of a token scales what passes from before it to readers at the token or later. Its gradient is the sum over
the rest of the chunk of q.dq - k.(b R) - k.(the other terms of dk), and of the parts of the state after the chunk,
dS.(2^L_C S) and k.(2^(L_C - L) U dS^T).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.chunk_grads import (
    CHANNEL_TILE,
    TILE_SHAPE,
    ChunkGradInputs,
    ChunkGradRefs,
    launch_chunk_grads,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    load_smem_f32,
    load_vector,
    row_and_column_iota,
    wgmma_accumulate,
    zero_accumulator,
)


class DeltaChunkGrads(NamedTuple):
    """Gradients per value head. Sums over channels are over each of P tiles of channels."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    erase: Float[Array, "B H P T"]
    decay_in_chunk: Float[Array, "B H P T"]
    """Its sum from a token to the end of the chunk is in the gradient of the token's decay."""
    decay_at_chunk_end: Float[Array, "B H P T"]
    """Its sum over the chunk is in the gradients of all decays of the chunk."""


class _ChunkDecay(NamedTuple):
    """Decays of a chunk as register arrays; None without gates."""

    from_start: Any = None
    to_end: Any = None
    log2_chunk: Any = None
    """Log2-decay over the chunk."""


def delta_chunk_grads(inputs: ChunkGradInputs, scale: float) -> DeltaChunkGrads:
    """Compute the gradients of queries, keys, erase strengths and decays.

    Args:
        inputs: q, k; the values dO, U and dW; the states S and dS; the weights are the cumulative decays if there are
            any, and the erase strengths.
        scale: Factor of the scores.

    Returns:
        The gradients; without decays, those of the decays are None.
    """
    num_sums = 3 if len(inputs.weights) > 1 else 1

    def chunk(refs: ChunkGradRefs):
        grads, sums = _chunk_grads(refs, scale)
        for i, x in enumerate(grads):
            refs.grads.at[i][...] = x.astype(refs.grads.dtype)
        for target, x in zip(refs.sums, sums, strict=True):
            target[...] = x

    dq, dk, sums = launch_chunk_grads(chunk, inputs, ((),) * num_sums)
    return DeltaChunkGrads(dq, dk, *sums, *((None,) * (3 - num_sums)))


def _chunk_grads(refs: ChunkGradRefs, scale):
    """Return dq and dk of one tile of channels, and the sums over its channels."""
    (q, k), (out_grad, v_new, write_grad), (state, state_grad) = (
        [x.at[i] for i in range(x.shape[0])] for x in (refs.qk, refs.values, refs.states)
    )
    *gates, erase = refs.weights
    read_grads, erase_grads, strength, decay = _pair_grads(out_grad, v_new, write_grad, gates, erase, scale)
    refs.pairs.at[0][...] = read_grads.astype(refs.pairs.dtype)
    (key_products,) = wgmma_accumulate((zero_accumulator(*CHUNK_SHAPE), (k, k.transpose((1, 0)))))
    erase_sum = jnp.sum(erase_grads * key_products, axis=1)
    refs.pairs.at[1][...] = (erase_grads * broadcast_per_row(-strength, CHUNK_SHAPE)).astype(refs.pairs.dtype)
    plgpu.commit_smem()

    def scale_by(x, factor):
        return x if factor is None else x * broadcast_per_row(factor, TILE_SHAPE)

    def row_dots(x, y):
        return jnp.sum(load_smem_f32(x) * y, axis=1)

    def state_product():
        return jnp.exp2(decay.log2_chunk) * jnp.sum(load_smem_f32(state) * load_smem_f32(state_grad), axis=1)

    # Registers suffice for it only after the sums with wide states, and only before them with narrow ones.
    at_end: Any = state_product() if gates and state.shape[1] == CHANNEL_TILE else None
    (dq,) = wgmma_accumulate((zero_accumulator(*TILE_SHAPE), (out_grad, state.transpose((1, 0)))))
    (dq,) = wgmma_accumulate((scale_by(dq * scale, decay.from_start), (refs.pairs.at[0], k)))
    in_chunk: Any = row_dots(q, dq) if gates else None
    dq = dq.astype(q.dtype)
    reader, dk = wgmma_accumulate(
        (zero_accumulator(*TILE_SHAPE), (write_grad, state.transpose((1, 0)))),
        (zero_accumulator(*TILE_SHAPE), (v_new, state_grad.transpose((1, 0)))),
    )
    reader, dk = scale_by(reader, decay.from_start), scale_by(dk, decay.to_end)
    erase_sum = -(erase_sum + row_dots(k, reader))
    key_part: Any = row_dots(k, dk) if gates else None
    reader, dk = wgmma_accumulate(
        (scale_by(reader, -strength), (refs.pairs.at[1], k)),
        (dk, (refs.pairs.at[0].transpose((1, 0)), q), (refs.pairs.at[1].transpose((1, 0)), k)),
    )
    if not gates:
        return (dq, reader + dk), (erase_sum,)
    in_chunk += row_dots(k, reader) - row_dots(k, dk)
    key_part += state_product() if at_end is None else at_end
    return (dq, reader + dk), (erase_sum, in_chunk, key_part)


def _pair_grads(out_grad, v_new, write_grad, gates, erase, scale):
    """Return scale dO U^T * D and dW U^T * D', the erase strengths, and the decays."""
    read_grads, erase_grads = wgmma_accumulate(
        (zero_accumulator(*CHUNK_SHAPE), (out_grad, v_new.transpose((1, 0)))),
        (zero_accumulator(*CHUNK_SHAPE), (write_grad, v_new.transpose((1, 0)))),
    )
    i, j = row_and_column_iota(CHUNK_SHAPE)
    read_grads, erase_grads = jnp.where(i >= j, read_grads * scale, 0.0), jnp.where(i > j, erase_grads, 0.0)
    strength = load_vector(erase, WGMMA_ROW)
    if not gates:
        return read_grads, erase_grads, strength, _ChunkDecay()
    query_decay = load_vector(gates[0], WGMMA_ROW)
    log2_decay = broadcast_per_row(query_decay, CHUNK_SHAPE)
    log2_decay = log2_decay - broadcast_per_column(load_vector(gates[1], WGMMA_COL), CHUNK_SHAPE)
    pairs = jnp.exp2(jnp.where(i >= j, log2_decay, -jnp.inf))
    read_grads, erase_grads = read_grads * pairs, erase_grads * pairs
    log2_chunk = plgpu.load(gates[0].at[CHUNK - 1])
    from_start, to_end = jnp.exp2(query_decay), jnp.exp2(log2_chunk - load_vector(gates[1], WGMMA_ROW))
    return read_grads, erase_grads, strength, _ChunkDecay(from_start, to_end, log2_chunk)
