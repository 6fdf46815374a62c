"""Linear attention with a decay per channel on Hopper (GLA, HGRN2).

    O = Q~ S + P V        S <- Diag(2^L_C) S + K~^T V

A first kernel computes Q~ (decayed since the chunk's start), K~ (decayed until its end) and the scores P of all chunks
(`channel_decay_forward.py`), which leaves three products per chunk for the loop over time. In the backward pass the
same loop gives the gradients of V and of the states, with Q~ and K~ exchanged; a last kernel then computes the other
gradients of each chunk (`channel_decay_backward.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_gpu.channel_decay_backward import ChannelGradInputs, channel_decay_grads
from recallax.pallas_kernels.mosaic_gpu.channel_decay_forward import chunk_state_decay, decay_queries_keys
from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import document_gates
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import sum_shared_heads
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    merge_rows,
    merge_rows_head_major,
    propagate_split_states,
    split_rows,
    split_rows_head_major,
    split_state_increments,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_ROW,
    broadcast_per_row,
    copy_smem_to_gmem,
    opaque_zero,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

WG_COLUMNS = 64
"""Columns of the values and of the state that a warpgroup owns: a tile of the tensor cores."""
NUM_PREFETCH = 1
"""Chunks that TMA loads ahead of the current one: each takes up to 58 KB of a block's shared memory."""


class LinearChannelInputs(NamedTuple):
    """Differentiable inputs. T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log2_decay: Float[Array, "B T H K"]
    """At least `MIN_LOG2_DECAY`."""
    state: Float[Array, "B H K V"]


class _ChunkInputs(NamedTuple):
    """Inputs of the loop over time, in its direction."""

    read: Float[Array, "B T H K"]
    """Multiplied with the state: Q~; in reverse K~."""
    write: Float[Array, "B T H K"]
    """Multiplied with the values to update the state: K~; in reverse Q~."""
    scores: Float[Array, "B H T C"]
    """P; the reverse loop transposes it."""
    chunk_decay: Float[Array, "B H N K"]
    """Decay of the state over each chunk."""


def _primal(config: LaunchConfig, inputs: LinearChannelInputs, document_ids: DocumentIds | None):
    """Return the output and the final state."""
    chunks = _prepare_chunks(config.scale, inputs, document_ids)
    out, final_state, _ = _loop_over_splits(chunks, inputs.v, inputs.state, config.num_splits, save_states=False)
    return out, final_state


def _fwd(config, inputs, document_ids):
    chunks = _prepare_chunks(config.scale, inputs, document_ids)
    out, final_state, (states,) = _loop_over_splits(chunks, inputs.v, inputs.state, config.num_splits, save_states=True)
    return (out, final_state), (inputs, document_ids, chunks, states)


def _bwd(config, residuals, output_grads):
    (inputs, document_ids, chunks, states), (out_grad, state_grad) = residuals, output_grads
    q, k, v, decay, _ = inputs
    reverse_chunks = chunks._replace(read=chunks.write, write=chunks.read)
    dv, dstate, (state_grads,) = _loop_over_splits(
        reverse_chunks, out_grad, state_grad, config.num_splits, save_states=True, reverse=True
    )
    gates = document_gates(document_ids) or ()
    grad_inputs = ChannelGradInputs(q, k, decay, (out_grad, v), (states, state_grads), gates)
    dq, dk, ddecay = channel_decay_grads(grad_inputs, chunks.chunk_decay, config.scale)
    return LinearChannelInputs(sum_shared_heads(dq, q), sum_shared_heads(dk, q), dv, ddecay, dstate), None


linear_attention_channel_decay = kernel_custom_vjp(_primal, _fwd, _bwd)


def _prepare_chunks(scale: float, inputs: LinearChannelInputs, document_ids: DocumentIds | None) -> _ChunkInputs:
    """Return the inputs of the loop forward in time."""
    gates = document_gates(document_ids)
    chunk_decay = chunk_state_decay(inputs.log2_decay, gates)
    return _ChunkInputs(*decay_queries_keys(inputs.q, inputs.k, inputs.log2_decay, gates, scale), chunk_decay)


def _loop_over_splits(chunks: _ChunkInputs, v, state, num_splits, *, save_states, reverse=False):
    """Run `_launch_chunk_loop` on all splits of a row at once, each with its own initial state."""
    n = num_splits
    initial_states = _split_states(chunks.write, v, chunks.chunk_decay, state, n, reverse=reverse)
    split_chunks = _ChunkInputs(
        *(split_rows(x, n) for x in chunks[:2]), *(split_rows_head_major(x, n) for x in chunks[2:])
    )
    v = split_rows(v, n)
    out, final_states, states = _launch_chunk_loop(
        split_chunks, v, initial_states, save_states=save_states, reverse=reverse
    )
    last = 0 if reverse else n - 1
    return merge_rows(out, n), final_states[last::n], tuple(merge_rows_head_major(x, n) for x in states)


def _split_states(
    write: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    chunk_decay: Float[Array, "B H N K"],
    state: Float[Array, "B H K V"],
    num_splits: int,
    *,
    reverse: bool,
) -> Float[Array, "M H K V"]:
    """Return the state before each of M = B * num_splits splits; in reverse, after it."""
    if num_splits == 1:
        return state
    by_split = split_rows_head_major(chunk_decay, num_splits)
    # Decay of a chunk's part until the other end of its split: the product over the chunks after it.
    others = jnp.roll(by_split, 1 if reverse else -1, axis=2).at[:, :, 0 if reverse else -1].set(1.0)
    to_split_end = merge_rows_head_major(lax.cumprod(others, axis=2, reverse=not reverse), num_splits)
    to_split_end = jnp.repeat(jnp.moveaxis(to_split_end, 1, 2), CHUNK, axis=1)
    write = (write.astype(jnp.float32) * to_split_end).astype(write.dtype)
    increments = split_state_increments(write, v, None, state.shape[1], num_splits, reverse=reverse)
    return propagate_split_states(increments, jnp.prod(by_split, axis=2)[..., None], state, reverse=reverse)


def _launch_chunk_loop(chunks: _ChunkInputs, v, state, *, save_states, reverse):
    """Compute read S + scores v for each chunk, and S <- chunk_decay * S + write^T v after it.

    Returns the output, the final state and a tuple with S before each chunk in bfloat16, empty without `save_states`.
    """
    b, t, h, k_dim = chunks.read.shape
    v_dim, num_chunks = v.shape[3], t // CHUNK
    saved = (jax.ShapeDtypeStruct((b, h, num_chunks, k_dim, v_dim), v.dtype),) if save_states else ()
    return launch_kernel(
        _chunk_loop_kernel(reverse),
        name="walk_back" if reverse else "walk",
        out_type=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32), saved),
        grid={"row": b, "head": h},
        num_consumer_wgs=v_dim // WG_COLUMNS,
    )(chunks.read, chunks.write, v, chunks.scores, chunks.chunk_decay.reshape(b, h, -1), state)


def _chunk_loop_kernel(reverse: bool):
    """Build the body of `_launch_chunk_loop`: each warpgroup owns columns of the values and of the state."""

    def chunk_loop(read, write, v, scores, chunk_decay, initial_state, out, final_state, saved_states):
        row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
        columns = pl.ds(warpgroup * WG_COLUMNS, WG_COLUMNS)
        num_wgs, num_chunks = v.shape[3] // WG_COLUMNS, v.shape[1] // CHUNK

        def order(step):
            return num_chunks - 1 - step if reverse else step

        def scoped(state_smem, out_smem):
            def context(pipeline):
                state = plgpu.load(initial_state.at[row, head, :, columns], layout=WGMMA, optimized=False)
                final_state[row, head, :, columns] = pipeline(state)
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, read, write, v, scores, chunk_decay, state):
                zero, step = opaque_zero(index[0]), order(index[0])
                operand, v = state_smem.at[zero, warpgroup], v.at[:, columns]
                if saved_states:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copy of the state
                operand[...] = state.astype(v.dtype)
                plgpu.commit_smem()
                if saved_states:
                    copy_smem_to_gmem((operand, saved_states[0].at[row, head, step, :, columns]))
                state *= broadcast_per_row(plgpu.load(chunk_decay, layout=WGMMA_ROW), state.shape)
                pairs = scores.transpose((1, 0)) if reverse else scores
                chunk_out, state = wgmma_accumulate(
                    (zero_accumulator(CHUNK, WG_COLUMNS), (read, operand), (pairs, v)),
                    (state, (write.transpose((1, 0)), v)),
                )
                plgpu.wait_smem_to_gmem(1 if saved_states else 0, wait_read_only=True)
                out_smem.at[zero, warpgroup][...] = chunk_out.astype(v.dtype)
                plgpu.commit_smem()
                time = pl.ds(step * CHUNK, CHUNK)
                copy_smem_to_gmem((out_smem.at[zero, warpgroup], out.at[row, time, head, columns]))
                return state

            tokens = [x.at[row, :, head] for x in (read, write, v)] + [scores.at[row, head]]
            vectors = [chunk_decay.at[row, head]]
            chunk_pipeline(chunk, tokens, vectors, context, num_wgs, WG_COLUMNS, NUM_PREFETCH, order)

        k_dim = read.shape[3]
        scratch = (smem_matrix(1, num_wgs, height, WG_COLUMNS, tile=WG_COLUMNS) for height in (k_dim, CHUNK))
        pl.run_scoped(scoped, *scratch, collective_axes="warpgroup")

    return chunk_loop
