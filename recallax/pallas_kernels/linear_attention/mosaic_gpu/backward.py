"""Backward pass of linear attention with a decay per token: a loop forward in time for dq, one backward for dk and dv.

A pair of tokens occurs twice in the sums for the decay's gradient, as q.dq and as k.dk, and contributes to that
gradient only where the two do not cancel. Both loops must therefore see the same rounding: decays are rounded into the
keys of the first loop and into the queries of the second, the sums use those, pairs within a chunk are float32 in both,
and the products for the sums also use the low part of the states.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.linear_attention.mosaic_gpu.forward import (
    MIN_DIM,
    NUM_PREFETCH,
    LinearAttentionInputs,
    LinearLoopConfig,
    LinearTokens,
    linear_forward_loop,
)
from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import cumulative_decay, decay_grad
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import sum_shared_heads
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    merge_rows,
    merge_rows_head_major,
    split_initial_states,
    split_rows,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    load_smem_f32,
    opaque_zero,
    round_to_dtype,
    row_and_column_iota,
    scale_rows,
    smem_matrix,
    store_through_smem,
    wgmma_accumulate,
    zero_accumulator,
)


def linear_attention_bwd(config: LaunchConfig, residuals, output_grads):
    """Return the gradients of the inputs, from those of the output and the final state."""
    (inputs, document_ids), n = residuals, config.num_splits
    q, k, v, decay, state = inputs
    out_grad, state_grad = output_grads
    gates, has_decay = cumulative_decay(decay, document_ids, v.shape[2]), decay is not None
    state, state_grad = jnp.swapaxes(state, 2, 3), jnp.swapaxes(state_grad, 2, 3)
    initial_states = split_initial_states(v, k, gates, state, n, reverse=False)
    final_grads = split_initial_states(out_grad, q, gates, state_grad, n, scale=config.scale, reverse=True)
    tokens = LinearTokens.from_inputs(inputs, gates, n)
    out_grad = split_rows(out_grad, n)
    dq, query_sums = _query_grad(tokens, initial_states, out_grad, config.scale, has_decay=has_decay)
    dk, dv, dstate, key_sums = _key_value_grads(
        tokens, out_grad, jnp.swapaxes(final_grads, 2, 3), config.scale, has_decay=has_decay
    )
    dq, dk, dv = merge_rows(dq, n), merge_rows(dk, n), merge_rows(dv, n)
    dq, dk = sum_shared_heads(dq, q), sum_shared_heads(dk, q)
    ddecay = None
    if has_decay:
        final_states, q_dot_dq = query_sums
        at_end = jnp.sum(final_states[n - 1 :: n] * state_grad, axis=(2, 3))
        token_grad = jnp.sum(q_dot_dq, axis=2) - jnp.sum(key_sums[0], axis=2)
        ddecay = decay_grad(merge_rows_head_major(token_grad, n), at_end, document_ids)
    return LinearAttentionInputs(dq, dk, dv, ddecay, dstate[::n]), None


def _query_grad(tokens: LinearTokens, state, out_grad, scale, *, has_decay):
    """Return dq per value head; with `has_decay` also the final state, transposed, and q.dq per warpgroup.

    dq is linear attention itself, of the queries `out_grad`, the keys v, the values k and the transposed state.
    """
    (rows, length, heads, v_dim), k_dim = tokens.v.shape, tokens.q.shape[3]
    config = LinearLoopConfig(length, v_dim, k_dim, scale, min(k_dim, v_dim) // MIN_DIM)

    def query_gradient(tokens, initial_state, out_grad, dq, decay_outputs):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        q, k, v, gates = tokens.of_head(row, head)
        operands = [out_grad.at[row, :, head], v, k, *([q] if has_decay else [])]
        final_state, sums = (x.at[row, head] for x in decay_outputs) if has_decay else (None, None)
        linear_forward_loop(
            config,
            operands,
            gates,
            initial_state.at[row, head],
            dq.at[row, :, head],
            final_state=final_state,
            decay_grad_sums=sums,
        )

    decay_outputs = (
        jax.ShapeDtypeStruct((rows, heads, v_dim, k_dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, heads, config.num_consumer_wgs, length), jnp.float32),
    )
    return launch_kernel(
        query_gradient,
        out_type=(
            jax.ShapeDtypeStruct((rows, length, heads, k_dim), tokens.q.dtype),
            decay_outputs if has_decay else (),
        ),
        grid={"row": rows, "head": heads},
        num_consumer_wgs=config.num_consumer_wgs,
    )(tokens, state, out_grad)


def _key_value_grads(tokens: LinearTokens, out_grad, state_grad, scale, *, has_decay):
    """Return dk per value head, dv and the gradient of the state; with `has_decay` also k.dk per warpgroup."""
    (rows, length, heads, v_dim), k_dim = tokens.v.shape, tokens.q.shape[3]
    config = LinearLoopConfig(length, k_dim, v_dim, scale, max(k_dim, v_dim) // MIN_DIM)

    def key_gradients(tokens, out_grad, final_grad, dk, dv, initial_grad, sums):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        q, k, v, gates = tokens.of_head(row, head)
        dk, dv, initial_grad = dk.at[row, :, head], dv.at[row, :, head], initial_grad.at[row, head]
        sums = sums[0].at[row, head] if has_decay else None
        operands = q, k, v, out_grad.at[row, :, head]
        linear_backward_loop(config, operands, gates, final_grad.at[row, head], dk, dv, initial_grad, sums)

    sums = jax.ShapeDtypeStruct((rows, heads, config.num_consumer_wgs, length), jnp.float32)
    return launch_kernel(
        key_gradients,
        out_type=(
            jax.ShapeDtypeStruct((rows, length, heads, k_dim), tokens.k.dtype),
            jax.ShapeDtypeStruct(tokens.v.shape, tokens.v.dtype),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
            (sums,) if has_decay else (),
        ),
        grid={"row": rows, "head": heads},
        num_consumer_wgs=config.num_consumer_wgs,
    )(tokens, out_grad, state_grad)


def linear_backward_loop(
    config: LinearLoopConfig, tokens, gates, final_state_grad, dk, dv, initial_state_grad, decay_grad_sums
) -> None:
    """Process the chunks of one head backward in time, in a block of threads.

    Each warpgroup owns columns of dv and of the state's gradient, and columns of dk.

    Args:
        config: Sizes.
        tokens: References to q, k, v and the output's gradient, [T, width] each in global memory.
        gates: References to the cumulative decays [T] for queries and for keys; empty: no decay.
        final_state_grad: Reference [K, V] to the gradient of the final state.
        dk: Reference [T, K] to the gradient of the keys.
        dv: Reference [T, V] to the gradient of the values.
        initial_state_grad: Reference [K, V] to the gradient of the initial state.
        decay_grad_sums: Reference [warpgroups, T] to k.dk over the columns of each warpgroup; None: it is not computed.
    """
    num_wgs, warpgroup = config.num_consumer_wgs, lax.axis_index("warpgroup")
    k_columns, v_columns, key_slice, value_slice = _own_columns(config, warpgroup)

    def scoped(state_smem, state_lo_smem, decayed_smem, out_smem, published):
        def context(pipeline):
            state = pipeline(plgpu.load(final_state_grad.at[:, value_slice], layout=WGMMA, optimized=False))
            initial_state_grad[:, value_slice] = state
            plgpu.wait_smem_to_gmem(0)

        def sync_warpgroups():
            if num_wgs > 1:
                plgpu.barrier_arrive(published)
                plgpu.barrier_wait(published)

        def chunk(index, q, k, v, out_grad, *rest):
            *gates, state = rest
            zero = opaque_zero(index[0])
            state_lo = None if state_lo_smem is None else state_lo_smem.at[zero]
            scratch = state_smem.at[zero], state_lo, decayed_smem.at[zero]
            dk_chunk, dv_chunk, sums, state = _backward_chunk(
                config, (q, k, v, out_grad), gates, state, scratch, sync_warpgroups
            )
            time = pl.ds((last - index[0]) * CHUNK, CHUNK)
            if decay_grad_sums is not None:
                decay_grad_sums[warpgroup, time] = sums
            if state_lo_smem is not None and out_smem is None:  # shared memory is short: reuse the state's low part
                dk_smem, dv_smem = (state_lo_smem.at[zero, warpgroup, pl.ds(i * CHUNK, CHUNK)] for i in range(2))
            else:
                dk_smem, dv_smem = (x.at[zero, warpgroup] for x in out_smem)
            store_through_smem(
                (dk_smem, dk_chunk, dk.at[time, key_slice]), (dv_smem, dv_chunk, dv.at[time, value_slice])
            )
            return state

        last = config.num_tokens // CHUNK - 1
        chunk_pipeline(
            chunk, tokens, gates, context, num_wgs, config.column_tile, NUM_PREFETCH, lambda step: last - step
        )

    scratch = _backward_scratch(config, k_columns, v_columns, decay_grad_sums is not None)
    pl.run_scoped(scoped, *scratch, collective_axes="warpgroup")


def _backward_scratch(config: LinearLoopConfig, k_columns: int, v_columns: int, has_decay: bool) -> tuple:
    """Return the state, its low part, the decayed keys, the outputs (None: they reuse the low part) and a barrier."""
    num_wgs, tile = config.num_consumer_wgs, config.column_tile
    state_smem, out_smem = smem_matrix(1, num_wgs, config.head_k_dim, v_columns, tile=tile), None
    if not has_decay or num_wgs == 1 or k_columns != v_columns:
        out_smem = tuple(smem_matrix(1, num_wgs, CHUNK, columns, tile=tile) for columns in (k_columns, v_columns))
    decayed_smem, published = smem_matrix(1, CHUNK, config.head_k_dim, tile=tile), plgpu.Barrier(num_arrivals=num_wgs)
    return state_smem, state_smem if has_decay else None, decayed_smem, out_smem, published


def _own_columns(config: LinearLoopConfig, warpgroup):
    """Return the numbers of key and value columns of a warpgroup, and the slices that it owns."""
    k_columns, v_columns = (dim // config.num_consumer_wgs for dim in (config.head_k_dim, config.head_v_dim))
    return k_columns, v_columns, pl.ds(warpgroup * k_columns, k_columns), pl.ds(warpgroup * v_columns, v_columns)


def _backward_chunk(config: LinearLoopConfig, tokens, gates, state, scratch, sync_warpgroups):
    """Return dk and dv of one chunk, the sums for the gates, and the gradient of the state before the chunk.

    Matrices of pairs have keys along the rows and queries along the columns. scratch, for all warpgroups: the state's
    gradient as an operand, its rounding error or None, and the queries decayed since the chunk's start.
    `sync_warpgroups` makes the warpgroups wait for each other.
    """
    (q, k, v, out_grad), (state_smem, state_lo_smem, decayed) = tokens, scratch
    num_wgs, warpgroup = config.num_consumer_wgs, lax.axis_index("warpgroup")
    k_columns, v_columns, key_slice, value_slice = _own_columns(config, warpgroup)
    dtype = v.dtype
    if gates:
        decay_from_start = jnp.exp2(plgpu.load(gates[0], layout=WGMMA_ROW))
        decayed_q = scale_rows(q.at[:, key_slice], decay_from_start, scale=config.scale)
    else:
        decayed_q = load_smem_f32(q.at[:, key_slice]) * config.scale
    decayed.at[:, key_slice][...] = decayed_q.astype(dtype)
    scores, score_grads, key_decay, sums = _pair_matrices(config, tokens, gates, with_sums=state_lo_smem is not None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    state_smem.at[warpgroup][...] = state.astype(dtype)
    if state_lo_smem is not None:
        state_lo_smem.at[warpgroup][...] = (state - round_to_dtype(state, dtype)).astype(dtype)
    plgpu.commit_smem()
    sync_warpgroups()
    states = [state_smem] if state_lo_smem is None else [state_smem, state_lo_smem]
    blocks = [(i, pl.ds(i * v_columns, v_columns)) for i in range(num_wgs)]
    dv_from_state = k, state_smem.at[warpgroup]
    dk_from_state = [(v.at[:, block], x.at[i, key_slice].transpose((1, 0))) for x in states for i, block in blocks]
    dv_from_pairs, dk_from_pairs = (scores, out_grad.at[:, value_slice]), (score_grads, q.at[:, key_slice])
    state_update = decayed.transpose((1, 0)), out_grad.at[:, value_slice]
    dv, dk = zero_accumulator(CHUNK, v_columns), zero_accumulator(CHUNK, k_columns)
    if gates:  # one after another: together they would need more registers than there are
        chunk_decay = plgpu.load(gates[0].at[CHUNK - 1])
        decay_to_end = jnp.exp2(chunk_decay - key_decay)
        (dv,) = wgmma_accumulate((dv, dv_from_state))
        dv, state = wgmma_accumulate(
            (dv * broadcast_per_row(decay_to_end, dv.shape), dv_from_pairs),
            (state * jnp.exp2(chunk_decay), state_update),
        )
        dv = dv.astype(dtype)
        (dk,) = wgmma_accumulate((dk, *dk_from_state))
        if state_lo_smem is not None:
            sums += jnp.sum(dk * scale_rows(k.at[:, key_slice], decay_to_end), axis=1)
        (dk,) = wgmma_accumulate((dk * broadcast_per_row(decay_to_end, dk.shape), dk_from_pairs))
    else:
        dv, dk, state = wgmma_accumulate(
            (dv, dv_from_state, dv_from_pairs), (dk, *dk_from_state, dk_from_pairs), (state, state_update)
        )
    sync_warpgroups()  # before any of them overwrites what the others read
    return dk.astype(dtype), dv.astype(dtype), sums, state


def _pair_matrices(config: LinearLoopConfig, tokens, gates, *, with_sums):
    """Return the scores, their gradients, the cumulative decay of the keys or None, and sums over queries or None.

    The first two are decayed and rounded to operands; the sums are those of their products.
    """
    q, k, v, out_grad = tokens
    scores, score_grads = wgmma_accumulate(
        (zero_accumulator(*CHUNK_SHAPE), (k, q.transpose((1, 0)))),
        (zero_accumulator(*CHUNK_SHAPE), (v, out_grad.transpose((1, 0)))),
    )
    key, query = row_and_column_iota(CHUNK_SHAPE)
    visible = key <= query
    key_decay: Any = None
    sums: Any = None
    if gates:
        key_decay = plgpu.load(gates[1], layout=WGMMA_ROW)
        log2_decay = broadcast_per_column(plgpu.load(gates[0], layout=WGMMA_COL), CHUNK_SHAPE)
        log2_decay = log2_decay - broadcast_per_row(key_decay, CHUNK_SHAPE)
        decay = jnp.exp2(jnp.where(visible, log2_decay, -jnp.inf)) * config.scale
        scores *= decay
        if with_sums:
            sums = jnp.sum(scores * score_grads, axis=1) / config.num_consumer_wgs
        score_grads *= decay
    else:
        # Not a product with a mask of 0 and 1: the compiler would keep that in registers from chunk to chunk.
        scores, score_grads = (jnp.where(visible, x * config.scale, 0.0) for x in (scores, score_grads))
    return scores.astype(v.dtype), score_grads.astype(v.dtype), key_decay, sums
