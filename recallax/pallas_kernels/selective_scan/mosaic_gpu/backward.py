"""Backward pass of the selective scan: each chunk recomputes its states, then goes backward in time."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import LOG2E
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import merge_rows, split_rows
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    WGMMA,
    copy_smem_to_gmem,
    zero_accumulator,
)
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


class _ScanGrads(NamedTuple):
    """Gradients of a launch; sums over rows, or over blocks of channels, are left to XLA."""

    x: Float[Array, "B T D"]
    rate: Float[Array, "B T D"]
    """Times log2(e)."""
    a: Float[Array, "B D N"]
    b: Float[Array, "B M T N"]
    c: Float[Array, "B M T N"]
    state: Float[Array, "B D N"]


class _BlockScratch(NamedTuple):
    """Shared memory of a block, for one chunk."""

    states: Any
    """[C, 64, N]: the state before each token."""
    x_grad: Any
    """[C, 64]"""
    rate_grad: Any
    """[C, 64]"""
    bc_grad: Any
    """[2, C, N]"""


class _ChunkRefs(NamedTuple):
    """Blocks of one chunk in shared memory."""

    x: Any
    rate: Any
    out_grad: Any
    b: Any
    c: Any
    state_mask: list


def selective_scan_bwd(config: LaunchConfig, residuals, output_grads):
    """Return the gradients of the inputs, from those of the output and the final state."""
    (inputs, state_mask, (states,)), (out_grad, state_grad), n = residuals, output_grads, config.num_splits
    parts, split_mask = inputs.split(n), None if state_mask is None else split_rows(state_mask, n)
    out_grad = split_rows(out_grad, n)
    launch = functools.partial(_launch_backward, parts, split_mask, states, out_grad)
    final_grads = split_boundary_states(
        lambda grad: launch(grad).state, inputs, state_mask, state_grad, n, reverse=True
    )
    grads = launch(final_grads)
    b_grad, c_grad = jnp.sum(grads.b, axis=1), jnp.sum(grads.c, axis=1)
    dx, drate, db, dc = (merge_rows(part, n) for part in (grads.x, grads.rate, b_grad, c_grad))
    return SelectiveScanInputs(dx, drate / LOG2E, jnp.sum(grads.a, axis=0) / LOG2E, db, dc, grads.state[::n]), None


def _launch_backward(inputs: SelectiveScanInputs, state_mask, states, out_grad, state_grad) -> _ScanGrads:
    """Run the kernel on all rows and blocks of channels."""
    (rows, length, channels), num_states, dtype = inputs.x.shape, inputs.a.shape[1], inputs.x.dtype
    shape, num_blocks = (BLOCK_CHANNELS, num_states), channels // BLOCK_CHANNELS

    def backward(x, rate, a, b, c, final_grad, out_grad, state_mask, states, *outputs):
        grads = _ScanGrads(*outputs)
        row, block = lax.axis_index("row"), lax.axis_index("block")
        own = pl.ds(block * BLOCK_CHANNELS, BLOCK_CHANNELS)

        def scoped(*refs):
            scratch, a_values = _BlockScratch(*refs), load_matrix(a.at[own])

            def chunk(step, *refs):
                *refs, carry = refs
                chunk_refs = _ChunkRefs._make((*refs[:5], refs[5:]))
                _recompute_states(scratch, chunk_refs, a_values, states.at[row, step, own])
                carry = _chunk_backward(scratch, chunk_refs, a_values, carry)
                plgpu.commit_smem()
                time = pl.ds(step * CHUNK, CHUNK)
                copies = [(scratch.x_grad, grads.x.at[row, time, own])]
                copies += [(scratch.rate_grad, grads.rate.at[row, time, own])]
                copies += [(scratch.bc_grad.at[i], x.at[row, block, time]) for i, x in enumerate((grads.b, grads.c))]
                copy_smem_to_gmem(*copies)
                return carry

            tokens = [z.at[row, :, own] for z in (x, rate, out_grad)]
            vectors = [z.at[row] for z in (b, c, *state_mask)]
            carry = load_matrix(final_grad.at[row, own]), zero_accumulator(*shape)
            grads.state[row, own], grads.a[row, own] = scan_pipeline(
                chunk, tokens, vectors, carry, length // CHUNK, reverse=True
            )
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((CHUNK, *shape), jnp.float32),
            plgpu.SMEM((CHUNK, BLOCK_CHANNELS), dtype),
            plgpu.SMEM((CHUNK, BLOCK_CHANNELS), jnp.float32),
            plgpu.SMEM((2, CHUNK, num_states), jnp.float32),
        )

    mixing_grad = jax.ShapeDtypeStruct((rows, num_blocks, length, num_states), jnp.float32)
    per_state = jax.ShapeDtypeStruct((rows, channels, num_states), jnp.float32)
    token_grads = (jax.ShapeDtypeStruct(inputs.x.shape, part) for part in (dtype, jnp.float32))
    grads = launch_kernel(
        backward,
        out_type=(*token_grads, per_state, mixing_grad, mixing_grad, per_state),
        grid={"row": rows, "block": num_blocks},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        column_sums=True,
    )(*inputs[:5], state_grad, out_grad, () if state_mask is None else (state_mask,), states)
    return _ScanGrads(*grads)


def _recompute_states(scratch: _BlockScratch, refs: _ChunkRefs, a, initial_state) -> None:
    """Store the state before each token of a chunk, from the state before the chunk."""

    def token(t, state):
        scratch.states.at[t][...] = state
        state = load_decay(refs.rate, a, refs.state_mask, t) * state
        return state + load_channel_vector(refs.x, t, a.shape) * load_state_vector(refs.b, t, a.shape)

    lax.fori_loop(0, CHUNK, token, load_matrix(initial_state))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _chunk_backward(scratch: _BlockScratch, refs: _ChunkRefs, a, carry):
    """Store the gradients of a chunk's tokens; the carry is the gradient of the state and the sum for that of a."""
    shape = a.shape

    def token(i, carry):
        state_grad, a_grad = carry
        t = CHUNK - 1 - i
        decay, x = load_decay(refs.rate, a, refs.state_mask, t), load_channel_vector(refs.x, t, shape)
        out_grad, b = load_channel_vector(refs.out_grad, t, shape), load_state_vector(refs.b, t, shape)
        decayed_state = decay * plgpu.load(scratch.states.at[t], layout=WGMMA)
        state_grad += out_grad * load_state_vector(refs.c, t, shape)
        scratch.bc_grad.at[0, t][...] = jnp.sum(state_grad * x, axis=0)
        scratch.bc_grad.at[1, t][...] = jnp.sum(out_grad * (decayed_state + x * b), axis=0)
        scratch.x_grad.at[t][...] = jnp.sum(state_grad * b, axis=1).astype(scratch.x_grad.dtype)
        exponent_grad = state_grad * decayed_state
        scratch.rate_grad.at[t][...] = jnp.sum(exponent_grad * a, axis=1)
        return state_grad * decay, a_grad + exponent_grad * load_channel_vector(refs.rate, t, shape)

    return lax.fori_loop(0, CHUNK, token, carry)
