"""Forward pass of the selective scan."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import merge_rows, split_rows
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import copy_smem_to_gmem
from recallax.pallas_kernels.selective_scan.mosaic_gpu.scan_blocks import (
    BLOCK_CHANNELS,
    CHUNK,
    SelectiveScanInputs,
    load_channel_vector,
    load_decay,
    load_matrix,
    load_state_vector,
    scan_pipeline,
    split_boundary_states,
)


def selective_scan_primal(config: LaunchConfig, inputs: SelectiveScanInputs, state_mask: Float[Array, "B T N"] | None):
    """Return the output and the final state."""
    return _forward_splits(config.num_splits, inputs, state_mask, save_states=False)[:2]


def selective_scan_fwd(config: LaunchConfig, inputs: SelectiveScanInputs, state_mask: Float[Array, "B T N"] | None):
    """Return the output and the final state, and the residuals: the inputs and the states of all chunks and splits."""
    *results, saved = _forward_splits(config.num_splits, inputs, state_mask, save_states=True)
    return tuple(results), (inputs, state_mask, saved)


def _forward_splits(num_splits, inputs, state_mask, *, save_states):
    """Run `_launch_forward` on all splits of a row at once; the saved states stay split."""
    n = num_splits
    parts, split_mask = inputs.split(n), None if state_mask is None else split_rows(state_mask, n)

    def final_states(state):
        return _launch_forward(parts._replace(state=state), split_mask, save_states=False)[1]

    initial_states = split_boundary_states(final_states, inputs, state_mask, inputs.state, n, reverse=False)
    out, final_state, saved = _launch_forward(parts._replace(state=initial_states), split_mask, save_states=save_states)
    return merge_rows(out, n), final_state[n - 1 :: n], saved


def _launch_forward(inputs: SelectiveScanInputs, state_mask, *, save_states):
    """Return the output, the final state and, if wanted, the states before the chunks."""
    (rows, length, channels), num_states, dtype = inputs.x.shape, inputs.a.shape[1], inputs.x.dtype
    num_chunks, shape = length // CHUNK, (BLOCK_CHANNELS, num_states)

    def forward(inputs, state_mask, out, final_state, saved):
        row, own = lax.axis_index("row"), pl.ds(lax.axis_index("block") * BLOCK_CHANNELS, BLOCK_CHANNELS)

        def scoped(out_smem):
            a = load_matrix(inputs.a.at[own])

            def chunk(step, x, rate, b, c, *rest):
                *mask, state = rest
                if save_states:
                    saved[0][row, step, own] = state
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def token(t, state):
                    state = load_decay(rate, a, mask, t) * state
                    state += load_channel_vector(x, t, shape) * load_state_vector(b, t, shape)
                    out_smem.at[t][...] = jnp.sum(state * load_state_vector(c, t, shape), axis=1).astype(out_smem.dtype)
                    return state

                state = lax.fori_loop(0, CHUNK, token, state)
                plgpu.commit_smem()
                copy_smem_to_gmem((out_smem, out.at[row, pl.ds(step * CHUNK, CHUNK), own]))
                return state

            tokens = [inputs.x.at[row, :, own], inputs.rate.at[row, :, own]]
            vectors = [z.at[row] for z in (inputs.b, inputs.c, *state_mask)]
            initial_state = load_matrix(inputs.state.at[row, own])
            final_state[row, own] = scan_pipeline(chunk, tokens, vectors, initial_state, num_chunks)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, plgpu.SMEM((CHUNK, BLOCK_CHANNELS), dtype))

    saved = (jax.ShapeDtypeStruct((rows, num_chunks, channels, num_states), jnp.float32),) if save_states else ()
    return launch_kernel(
        forward,
        out_type=(
            jax.ShapeDtypeStruct(inputs.x.shape, dtype),
            jax.ShapeDtypeStruct(inputs.state.shape, jnp.float32),
            saved,
        ),
        grid={"row": rows, "block": channels // BLOCK_CHANNELS},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(inputs, () if state_mask is None else (state_mask,))
