"""Backward pass of BASED: loops for the states and for their gradients, then the gradients of each chunk.

With g and d the gradients of numerators and denominators, s' = 1 + q.k, S and z the state before a chunk, and dS and dz
the gradients of the state after it,

    dV = phi(K) dS + F^T g         F = (1 + s'^2)/2, on and below the diagonal
    dphi(q) = S g + z d            dphi(k) = dS v + dz
    ds = s' (g.v + d)

A feature is a product of two columns, so the gradient of each column is that of the feature times the other column.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    pair_decay,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_chunk_states import (
    StateSumInputs,
    TaylorChunkStates,
    TaylorKernelInputs,
    taylor_chunk_states,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import (
    FIRST_SELECTION,
    HEAD_V_DIM,
    KEY_SELECTION,
    NUM_FEATURE_TILES,
    NUM_PADDED_FEATURES,
    NUM_SELECTIONS,
    PADDED_HEAD_K_DIM,
    QUERY_SELECTION,
    feature_factors,
    selection_matrices,
    tile_slice,
)

NUM_COPIES = 10
"""Copies of a block before it computes, without gates."""


class _ChunkGradInputs(NamedTuple):
    """Arrays of the launch."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H V"]
    out_grad: Float[Array, "B T H V"]
    denominator_grad: Float[Array, "B H T"]
    gates: CumulativeDecay | tuple[()]
    selections: Float[Array, "3 F D"]
    states: tuple[Float[Array, "B H N F V"], Float[Array, "B H N F V"]]
    """S and dS."""
    z: tuple[Float[Array, "B H N F"], Float[Array, "B H N F"]]
    """z and dz."""


class _ChunkScratch(NamedTuple):
    """Shared memory of a block."""

    qk: Any
    """[2, C, D]: q and k; then their gradients."""
    values: Any
    """[2, C, V]: v and the gradient of the numerators; then the gradient of v."""
    states: Any
    """[2, F, V]"""
    z: Any
    """[2, F]"""
    selections: Any
    """[3, F, D]"""
    kernel: Any
    """[C, C]: F."""
    score_grads: Any
    """[C, C]: ds."""
    vectors: Any
    """[3, C]: the gradient of the denominators, and the gates."""
    loaded: Any
    """Barrier of the copies."""


class _ChunkSums(NamedTuple):
    """Accumulators of a chunk."""

    v_grad: jax.Array
    q_grad: jax.Array
    k_grad: jax.Array


def taylor_attention_bwd(config: LaunchConfig, residuals, output_grads):
    """Return the gradients of the inputs, from those of the numerators, the denominators, the final state and z."""
    (inputs, gates), (out_grad, denominator_grad, state_grad, z_grad) = residuals, output_grads
    (q, k, v, state, z), n = inputs, config.num_splits
    ones, gates = jnp.ones_like(denominator_grad), gates or ()
    before = taylor_chunk_states(StateSumInputs(k, v, ones, gates), state, z, n, reverse=False)
    query_sums = StateSumInputs(q, out_grad, denominator_grad, gates)
    after = taylor_chunk_states(query_sums, state_grad, z_grad, n, reverse=True)
    dq, dk, dv = _launch_chunk_grads(inputs, gates, out_grad, denominator_grad, before, after)
    return TaylorKernelInputs(dq, dk, dv, after.state, after.z), None


def _launch_chunk_grads(
    inputs: TaylorKernelInputs, gates, out_grad, denominator_grad, before: TaylorChunkStates, after: TaylorChunkStates
):
    """Return the gradients of queries, keys and values."""
    q, k, v = inputs[:3]
    b, t, h, _ = q.shape

    def chunk_gradients(inputs, dq, dk, dv):
        row, head, n = (lax.axis_index(name) for name in ("row", "head", "chunk"))
        time = pl.ds(n * CHUNK, CHUNK)

        def scoped(*refs):
            scratch = _ChunkScratch(*refs)
            _load_chunk(inputs, scratch, row, head, n, time)
            chunk_gates = [scratch.vectors.at[1 + i] for i in range(len(inputs.gates))]
            *qk_grads, v_grad = _chunk_grads(scratch, scratch.vectors.at[0], chunk_gates)
            for i, x in enumerate(qk_grads):
                scratch.qk.at[i][...] = x.astype(scratch.qk.dtype)
            scratch.values.at[0][...] = v_grad.astype(scratch.values.dtype)
            plgpu.commit_smem()
            targets = [x.at[row, time, head] for x in (dq, dk, dv)]
            copy_smem_to_gmem(*zip((scratch.qk.at[0], scratch.qk.at[1], scratch.values.at[0]), targets, strict=True))
            plgpu.wait_smem_to_gmem(0)

        tile = PADDED_HEAD_K_DIM
        pl.run_scoped(
            scoped,
            smem_matrix(2, CHUNK, PADDED_HEAD_K_DIM, tile=tile),
            smem_matrix(2, CHUNK, HEAD_V_DIM, tile=64),
            smem_matrix(2, NUM_PADDED_FEATURES, HEAD_V_DIM, tile=64),
            plgpu.SMEM((2, NUM_PADDED_FEATURES), jnp.float32),
            smem_matrix(NUM_SELECTIONS, NUM_PADDED_FEATURES, PADDED_HEAD_K_DIM, tile=tile),
            smem_matrix(*CHUNK_SHAPE, tile=64),
            smem_matrix(*CHUNK_SHAPE, tile=tile),
            plgpu.SMEM((3, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=NUM_COPIES + len(inputs.gates)),
        )

    states, z = (before.chunk_states, after.chunk_states), (before.chunk_z, after.chunk_z)
    grad_inputs = _ChunkGradInputs(q, k, v, out_grad, denominator_grad, gates, selection_matrices(), states, z)
    return launch_kernel(
        chunk_gradients,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(grad_inputs)


def _load_chunk(inputs, scratch: _ChunkScratch, row, head, n, time) -> None:
    """Copy the inputs of a chunk (references, as `_ChunkGradInputs`) to shared memory and wait for them."""
    copies = [(x.at[row, time, head], scratch.qk.at[i]) for i, x in enumerate((inputs.q, inputs.k))]
    copies += [(x.at[row, time, head], scratch.values.at[i]) for i, x in enumerate((inputs.v, inputs.out_grad))]
    copies += [(x.at[row, head, n], scratch.states.at[i]) for i, x in enumerate(inputs.states)]
    copies += [(x.at[row, head, n], scratch.z.at[i]) for i, x in enumerate(inputs.z)]
    copies += [(inputs.selections, scratch.selections)]
    copies += [(inputs.denominator_grad.at[row, head, time], scratch.vectors.at[0])]
    copies += [(x.at[row, 0, time], scratch.vectors.at[1 + i]) for i, x in enumerate(inputs.gates)]
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, scratch.loaded)
    plgpu.barrier_wait(scratch.loaded)


def _chunk_grads(scratch: _ChunkScratch, denominator_grad, gates):
    """Return dq, dk and dv of one chunk."""
    (q, k), (v, out_grad) = ((x.at[0], x.at[1]) for x in (scratch.qk, scratch.values))
    dtype = scratch.values.dtype
    scores, score_grads = wgmma_accumulate(
        (zero_accumulator(*CHUNK_SHAPE), (q, k.transpose((1, 0)))),
        (zero_accumulator(*CHUNK_SHAPE), (out_grad, v.transpose((1, 0)))),
    )
    denominator_grad = plgpu.load(denominator_grad, layout=WGMMA_ROW)
    score_grads = scores * (score_grads + broadcast_per_row(denominator_grad, CHUNK_SHAPE))
    scores = 0.5 + 0.5 * scores * scores
    i, j = row_and_column_iota(CHUNK_SHAPE)
    from_start: Any = None
    to_end: Any = None
    if gates:
        query_decay = plgpu.load(gates[0], layout=WGMMA_ROW)
        decay = pair_decay(query_decay, gates[1], i >= j)
        scores, score_grads = scores * decay, score_grads * decay
        from_start = jnp.exp2(query_decay)
        to_end = jnp.exp2(plgpu.load(gates[0].at[CHUNK - 1]) - plgpu.load(gates[1], layout=WGMMA_ROW))
    for ref, x in ((scratch.kernel, scores), (scratch.score_grads, score_grads)):
        ref[...] = (x if gates else jnp.where(i >= j, x, 0.0)).astype(dtype)
    plgpu.commit_smem()
    sums = _add_state_grads(scratch, denominator_grad)
    dv, dq, dk = sums
    if gates:
        dv, dk = (x * broadcast_per_row(to_end, x.shape) for x in (dv, dk))
        dq *= broadcast_per_row(from_start, dq.shape)
    dq, dk = wgmma_accumulate((dq, (scratch.score_grads, k)), (dk, (scratch.score_grads.transpose((1, 0)), q)))
    (dv,) = wgmma_accumulate((dv, (scratch.kernel.transpose((1, 0)), out_grad)))
    plgpu.commit_smem()  # all warps have read
    return dq, dk, dv


def _add_state_grads(scratch: _ChunkScratch, denominator_grad) -> _ChunkSums:
    """Return the parts of the gradients that come from the states, summed over the tiles of features."""
    (q, k), (v, out_grad), dtype = (
        (scratch.qk.at[0], scratch.qk.at[1]),
        (scratch.values.at[0], scratch.values.at[1]),
        scratch.values.dtype,
    )
    sides = ((q, out_grad, 0, QUERY_SELECTION, denominator_grad), (k, v, 1, KEY_SELECTION, None))

    def add_tile(n, sums):
        v_grad, q_grad, k_grad = sums
        for x, y, side, second_selection, weight in sides:
            state = scratch.states.at[side, tile_slice(n)]
            z = broadcast_per_column(plgpu.load(scratch.z.at[side, tile_slice(n)], layout=WGMMA_COL), CHUNK_SHAPE)
            z = z if weight is None else z * broadcast_per_row(weight, CHUNK_SHAPE)
            first, second = feature_factors(x, scratch.selections, n, second_selection)
            if side == 1:
                (v_grad,) = wgmma_accumulate((v_grad, ((first * second).astype(dtype), state)))
            (phi_grad,) = wgmma_accumulate((z, (y, state.transpose((1, 0)))))
            products = ((phi_grad * second).astype(dtype), scratch.selections.at[FIRST_SELECTION, tile_slice(n)])
            swapped = ((phi_grad * first).astype(dtype), scratch.selections.at[second_selection, tile_slice(n)])
            (x_grad,) = wgmma_accumulate((k_grad if side else q_grad, products, swapped))
            q_grad, k_grad = (q_grad, x_grad) if side else (x_grad, k_grad)
        return _ChunkSums(v_grad, q_grad, k_grad)

    zeros = (zero_accumulator(CHUNK, width) for width in (HEAD_V_DIM, PADDED_HEAD_K_DIM, PADDED_HEAD_K_DIM))
    return lax.fori_loop(0, NUM_FEATURE_TILES, add_tile, _ChunkSums(*zeros))
