"""Forward pass of BASED: a loop over the chunks of one head with all three tiles of features in one warpgroup."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    merge_rows,
    merge_rows_head_major,
    split_gates,
    split_rows,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    opaque_zero,
    pair_decay,
    scale_rows,
    smem_matrix,
    store_through_smem,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_chunk_states import (
    NUM_PREFETCH,
    StateSumInputs,
    TaylorKernelInputs,
    taylor_split_states,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import (
    HEAD_V_DIM,
    KEY_SELECTION,
    NUM_FEATURE_TILES,
    NUM_PADDED_FEATURES,
    NUM_SELECTIONS,
    PADDED_HEAD_K_DIM,
    QUERY_SELECTION,
    feature_tile,
    selection_matrices,
    tile_slice,
)

SELECTION_TILE = 32
"""Columns of a shared-memory tile of the selection matrices: all of them."""


class _TaylorTokens(NamedTuple):
    """Per-token arrays of the launch, in which every split is a row."""

    q: Float[Array, "N S H D"]
    k: Float[Array, "N S H D"]
    v: Float[Array, "N S H V"]
    gates: CumulativeDecay | tuple[()]


class _LoopScratch(NamedTuple):
    """Shared memory of the loop."""

    state: Any
    """[1, F, V]: the state as an operand."""
    z: Any
    """[1, F]: the sums of the features, float32."""
    selections: Any
    """[1, 3, F, D]"""
    masked: Any
    """[1, 2, C, D]: with documents, queries that see the state before the chunk and keys that are in the state after
    it; zeros in place of the others."""
    out: Any
    """[1, C, V]"""
    loaded: Any
    """Barrier of the copies before the loop."""


def taylor_attention_primal(config: LaunchConfig, inputs: TaylorKernelInputs, gates: CumulativeDecay | None):
    """Return the numerators in v's dtype, and the denominators [B, H, T], the final state and z in float32."""
    n, (q, k, v, state, z) = config.num_splits, inputs
    ones = jnp.ones((v.shape[0], v.shape[2], v.shape[1]), jnp.float32)
    initial_states = taylor_split_states(StateSumInputs(k, v, ones, gates or ()), state, z, n, reverse=False)
    q, k, v = (split_rows(x, n) for x in (q, k, v))
    tokens = _TaylorTokens(q, k, v, split_gates(gates, n) or ())
    out, denominator, final_state, final_z = _launch_forward(tokens, *initial_states)
    return merge_rows(out, n), merge_rows_head_major(denominator, n), final_state[n - 1 :: n], final_z[n - 1 :: n]


def taylor_attention_fwd(config: LaunchConfig, inputs: TaylorKernelInputs, gates: CumulativeDecay | None):
    """Return the outputs of `taylor_attention_primal`, and its inputs as residuals."""
    return taylor_attention_primal(config, inputs, gates), (inputs, gates)


def _launch_forward(tokens: _TaylorTokens, state, z):
    """Return the numerators, the denominators, the final states and the final z of all rows and heads."""
    b, t, h, _ = tokens.q.shape

    def forward(tokens, selections, initial_state, initial_z, out, denominator, final_state, final_z):
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def scoped(*refs):
            scratch = _LoopScratch(*refs)

            def context(pipeline):
                plgpu.copy_gmem_to_smem(selections, scratch.selections, scratch.loaded)
                plgpu.copy_gmem_to_smem(initial_z.at[row, head], scratch.z.at[0], scratch.loaded)
                plgpu.barrier_wait(scratch.loaded)
                tiles = [initial_state.at[row, head, tile_slice(i)] for i in range(NUM_FEATURE_TILES)]
                states = pipeline([plgpu.load(tile, layout=WGMMA, optimized=False) for tile in tiles])
                for i in range(NUM_FEATURE_TILES):
                    final_state[row, head, tile_slice(i)] = states[i]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(scratch.z.at[0], final_z.at[row, head])
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, q, k, v, *rest):
                *gates, states = rest
                zero = opaque_zero(index[0])
                own = _LoopScratch._make((*(x.at[zero] for x in scratch[:-1]), scratch.loaded))
                time = pl.ds(index[0] * CHUNK, CHUNK)
                chunk_out, denominator[row, head, time] = _chunk_outputs(q, k, v, gates, states, own)
                store_through_smem((own.out, chunk_out, out.at[row, time, head]))
                return _update_states(k, v, gates, states, own)

            gates = [gate.at[row, 0] for gate in tokens.gates]
            matrices = [x.at[row, :, head] for x in (tokens.q, tokens.k, tokens.v)]
            chunk_pipeline(chunk, matrices, gates, context, 1, None, NUM_PREFETCH, chunk_order=lambda step: step)

        pl.run_scoped(
            scoped,
            smem_matrix(1, NUM_PADDED_FEATURES, HEAD_V_DIM, tile=64),
            plgpu.SMEM((1, NUM_PADDED_FEATURES), jnp.float32),
            smem_matrix(1, NUM_SELECTIONS, NUM_PADDED_FEATURES, PADDED_HEAD_K_DIM, tile=SELECTION_TILE),
            smem_matrix(1, 2, CHUNK, PADDED_HEAD_K_DIM, tile=PADDED_HEAD_K_DIM),
            smem_matrix(1, CHUNK, HEAD_V_DIM, tile=64),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="warpgroup",
        )

    return launch_kernel(
        forward,
        out_type=(
            jax.ShapeDtypeStruct(tokens.v.shape, tokens.v.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(z.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        num_consumer_wgs=1,
    )(tokens, selection_matrices()[None], state, z)


def _chunk_outputs(q, k, v, gates, states, scratch: _LoopScratch):
    """Return the numerators and denominators of one chunk."""
    dtype, state_queries = v.dtype, q
    query_decay: Any = None
    if gates:
        query_decay, chunk_decay = plgpu.load(gates[0], layout=WGMMA_ROW), plgpu.load(gates[0].at[CHUNK - 1])
        to_end = jnp.exp2(chunk_decay - plgpu.load(gates[1], layout=WGMMA_ROW))
        for i, (x, factor) in enumerate(((q, jnp.exp2(query_decay)), (k, to_end))):
            scratch.masked.at[i][...] = scale_rows(x, factor).astype(dtype)
        state_queries = scratch.masked.at[0]
    for i in range(NUM_FEATURE_TILES):
        scratch.state.at[tile_slice(i)][...] = states[i].astype(dtype)
    plgpu.commit_smem()
    out, sums = zero_accumulator(CHUNK, HEAD_V_DIM), []
    for i in range(NUM_FEATURE_TILES):
        phi = feature_tile(state_queries, scratch.selections, i, QUERY_SELECTION)
        z = plgpu.load(scratch.z.at[tile_slice(i)], layout=WGMMA_COL)
        sums.append(jnp.sum(phi * broadcast_per_column(z, CHUNK_SHAPE), axis=1))
        (out,) = wgmma_accumulate((out, (phi.astype(dtype), scratch.state.at[tile_slice(i)])))
    denominator = sums[0] + sums[1] + sums[2]
    (scores,) = wgmma_accumulate((zero_accumulator(*CHUNK_SHAPE), (q, k.transpose((1, 0)))))
    scores = 0.5 + 0.5 * scores * scores
    query, key = (plgpu.broadcasted_iota(jnp.int32, CHUNK_SHAPE, axis, layout=WGMMA) for axis in (0, 1))
    visible = query >= key
    if gates:
        query_decay = plgpu.load(gates[0], layout=WGMMA_ROW)  # again: it need not stay in registers
        scores *= pair_decay(query_decay, gates[1], visible)
    else:
        scores = jnp.where(visible, scores, 0.0)
    denominator += jnp.sum(scores, axis=1)
    (out,) = wgmma_accumulate((out, (scores.astype(dtype), v)))
    return out.astype(dtype), denominator


def _update_states(k, v, gates, states, scratch: _LoopScratch):
    """Return the states after a chunk, and replace z in shared memory."""
    new_states = []
    k = scratch.masked.at[1] if gates else k
    for i, state in enumerate(states):
        phi = feature_tile(k, scratch.selections, i, KEY_SELECTION, transposed=True)
        z = plgpu.load(scratch.z.at[tile_slice(i)], layout=WGMMA_ROW)
        if gates:
            chunk_decay = jnp.exp2(plgpu.load(gates[0].at[CHUNK - 1]))
            state, z = state * chunk_decay, z * chunk_decay
        scratch.z.at[tile_slice(i)][...] = z + jnp.sum(phi, axis=1)
        (state,) = wgmma_accumulate((state, (phi.astype(v.dtype), v)))
        new_states.append(state)
    return new_states
