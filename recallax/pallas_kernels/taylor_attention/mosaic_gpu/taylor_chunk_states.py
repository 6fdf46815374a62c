"""The states of BASED at the borders of chunks and of splits: a loop over time, forward or backward."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    merge_rows_head_major,
    propagate_split_states,
    split_decay,
    split_gates,
    split_rows,
    split_rows_head_major,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    copy_smem_to_gmem,
    opaque_zero,
    scale_rows,
    smem_matrix,
    wgmma_accumulate,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import (
    FEATURE_TILE,
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

NUM_PREFETCH = 1
"""Chunks that TMA loads ahead."""


class TaylorKernelInputs(NamedTuple):
    """Differentiable inputs. T is a multiple of the chunk; D = 32 columns: 16 channels, a column of ones, and zeros."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H V"]
    state: Float[Array, "B H F V"]
    z: Float[Array, "B H F"]


class StateSumInputs(NamedTuple):
    """Sums over time of phi(x) y^T, and of phi(x) times a weight: the state and z.

    x and y are keys and values; in reverse queries and the gradients of the numerators.
    """

    x: Float[Array, "B T H D"]
    y: Float[Array, "B T H V"]
    weights: Float[Array, "B H T"]
    gates: CumulativeDecay | tuple[()]

    def split(self, num_splits: int) -> "StateSumInputs":
        """Make every split a row."""
        return StateSumInputs(
            split_rows(self.x, num_splits),
            split_rows(self.y, num_splits),
            split_rows_head_major(self.weights, num_splits),
            split_gates(self.gates or None, num_splits) or (),
        )


class TaylorChunkStates(NamedTuple):
    """States at the borders of chunks and after the last one, in the direction of the loop."""

    chunk_states: Float[Array, "B H N F V"]
    chunk_z: Float[Array, "B H N F"]
    state: Float[Array, "B H F V"]
    z: Float[Array, "B H F"]


def taylor_split_states(
    inputs: StateSumInputs, state: Float[Array, "B H F V"], z: Float[Array, "B H F"], num_splits: int, *, reverse: bool
) -> tuple[Float[Array, "N H F V"], Float[Array, "N H F"]]:
    """Compute the state and z before each of N = B * num_splits splits; in reverse, after it.

    Args:
        inputs: Summands of whole rows.
        state: State before each row; in reverse, after it.
        z: The same for z.
        num_splits: Splits of a row.
        reverse: Go backward in time.
    """
    if num_splits == 1:
        return state, z
    zero_state, zero_z = (jnp.zeros((num_splits * len(part), *part.shape[1:]), part.dtype) for part in (state, z))
    parts = inputs.split(num_splits)
    _, increments, z_increments = _launch_chunk_states(parts, zero_state, zero_z, reverse=reverse, save_states=False)
    decay = jnp.ones((len(increments), 1), jnp.float32)
    if inputs.gates:
        decay = split_decay(CumulativeDecay(*inputs.gates), num_splits)
    return (
        propagate_split_states(increments, decay[:, :, None, None], state, reverse=reverse),
        propagate_split_states(z_increments, decay[:, :, None], z, reverse=reverse),
    )


def taylor_chunk_states(inputs: StateSumInputs, state, z, num_splits: int, *, reverse: bool) -> TaylorChunkStates:
    """Compute the states before all chunks; in reverse, after them. Arguments as in `taylor_split_states`."""
    n = num_splits
    initial_states = taylor_split_states(inputs, state, z, n, reverse=reverse)
    (chunk_states, chunk_z), *final = _launch_chunk_states(
        inputs.split(n), *initial_states, reverse=reverse, save_states=True
    )
    last = 0 if reverse else n - 1
    return TaylorChunkStates(
        merge_rows_head_major(chunk_states, n), merge_rows_head_major(chunk_z, n), *(part[last::n] for part in final)
    )


def _launch_chunk_states(inputs: StateSumInputs, initial_state, initial_z, *, reverse, save_states):
    """Return the states and z of all chunks if they are saved, the last state and the last z."""
    b, t, h, _ = inputs.x.shape
    chunks = (
        jax.ShapeDtypeStruct((b, h, t // CHUNK, NUM_PADDED_FEATURES, HEAD_V_DIM), inputs.y.dtype),
        jax.ShapeDtypeStruct((b, h, t // CHUNK, NUM_PADDED_FEATURES), jnp.float32),
    )
    return launch_kernel(
        _chunk_states_kernel(reverse),
        name="states_back" if reverse else "states",
        out_type=(
            chunks if save_states else (),
            jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
            jax.ShapeDtypeStruct(initial_z.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        num_consumer_wgs=NUM_FEATURE_TILES,
    )(inputs, selection_matrices(), initial_state, initial_z)


def _chunk_states_kernel(reverse: bool):
    """Build the body of `_launch_chunk_states`: each warpgroup owns a tile of the features."""
    second_selection = QUERY_SELECTION if reverse else KEY_SELECTION

    def chunk_states(inputs, selections, initial_state, initial_z, saved, final_state, final_z):
        row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
        own, num_chunks = tile_slice(warpgroup), inputs.x.shape[1] // CHUNK

        def order(step):
            return num_chunks - 1 - step if reverse else step

        def scoped(state_smem, selection_smem, decayed_smem, loaded):
            def context(pipeline):
                for n in range(NUM_SELECTIONS):
                    target = selection_smem.at[0, warpgroup, n]
                    plgpu.copy_gmem_to_smem(selections.at[n, own], target, loaded.at[warpgroup])
                plgpu.barrier_wait(loaded.at[warpgroup])
                state = plgpu.load(initial_state.at[row, head, own], layout=WGMMA, optimized=False)
                z = plgpu.load(initial_z.at[row, head, own], layout=WGMMA_ROW, optimized=False)
                final_state[row, head, own], final_z[row, head, own] = pipeline((state, z))
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, x, y, weight, *rest):
                *gates, (state, z) = rest
                step, zero = order(index[0]), opaque_zero(index[0])
                operand = state_smem.at[zero, warpgroup]
                if saved:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    operand[...] = state.astype(y.dtype)
                    saved[1][row, head, step, own] = z
                if gates:
                    chunk_decay, decay = plgpu.load(gates[0].at[CHUNK - 1]), plgpu.load(gates[0], layout=WGMMA_ROW)
                    decay = decay if reverse else chunk_decay - plgpu.load(gates[1], layout=WGMMA_ROW)
                    decayed = decayed_smem.at[zero, warpgroup]
                    decayed[...] = scale_rows(x, jnp.exp2(decay)).astype(x.dtype)
                    state, z, x = state * jnp.exp2(chunk_decay), z * jnp.exp2(chunk_decay), decayed
                plgpu.commit_smem()
                if saved:
                    copy_smem_to_gmem((operand, saved[0].at[row, head, step, own]))
                phi = feature_tile(x, selection_smem.at[zero, warpgroup], 0, second_selection, transposed=True)
                weighted = phi * broadcast_per_column(plgpu.load(weight, layout=WGMMA_COL), phi.shape)
                (state,) = wgmma_accumulate((state, (phi.astype(y.dtype), y)))
                plgpu.commit_smem()  # before the chunk is released
                return state, z + jnp.sum(weighted, axis=1)

            tokens = [ref.at[row, :, head] for ref in (inputs.x, inputs.y)]
            vectors = [inputs.weights.at[row, head], *(gate.at[row, 0] for gate in inputs.gates)]
            chunk_pipeline(chunk, tokens, vectors, context, NUM_FEATURE_TILES, None, NUM_PREFETCH, order)

        tile, n = PADDED_HEAD_K_DIM, NUM_FEATURE_TILES
        pl.run_scoped(
            scoped,
            smem_matrix(1, n, FEATURE_TILE, HEAD_V_DIM, tile=64),
            smem_matrix(1, n, NUM_SELECTIONS, FEATURE_TILE, PADDED_HEAD_K_DIM, tile=tile),
            smem_matrix(1, n, CHUNK, PADDED_HEAD_K_DIM, tile=tile),
            plgpu.Barrier(num_arrivals=NUM_SELECTIONS, num_barriers=n),
            collective_axes="warpgroup",
        )

    return chunk_states
