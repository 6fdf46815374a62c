"""Loops over the chunks of one head for the delta rule, with the state in registers.

Forward in time, from the state S before a chunk and the chunk's inverse T, and backward from the gradient dS after it:

    U = T (w V - b 2^L K S)                               O = scale (2^L Q S + (Q K^T * D) U)
    S <- 2^L_C S + K^T (2^(L_C - L) U)
    dW = T^T (scale (Q K^T * D)^T dO + 2^(L_C - L) K dS)
    dS <- 2^L_C dS + Q^T (scale 2^L dO) - K^T (b 2^L dW)

with D_ij = 2^(L_i - L_j) for j <= i. U are the values that are written; dW is the gradient of w V. With decays per
channel, a kernel before the loop has decayed queries Q~, erase keys E~ and keys K~, and computed the scores P:

    U = T (w V - E~ S)        O = Q~ S + P U        S <- Diag(2^L_C) S + K~^T U
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import (
    WG_SHAPE,
    StateLoopConfig,
    apply_inverse,
    state_chunk_loop,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA_COL,
    WGMMA_ROW,
    Ref,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    load_smem_f32,
    pair_decay,
    row_and_column_iota,
    wgmma_accumulate,
    zero_accumulator,
)


class ResidualRefs(NamedTuple):
    """References in global memory to what a loop stores for the gradients."""

    v_new: Ref
    """[T, V]: U; in the backward loop dW."""
    states: Ref
    """[N, K, V]: S before each chunk, or dS after it, in bfloat16."""


class _WarpgroupScratch(NamedTuple):
    """Shared memory of one warpgroup."""

    state: Ref
    """[K, 64]: the state as an operand."""
    hi: Ref
    """[C, 64]: high part of the right-hand sides; then an operand of the state's update."""
    lo: Ref
    """[C, 64]: low part of the right-hand sides; then an operand of the state's update."""
    out: Ref
    """[C, 64]: the output on its way to global memory."""


def _scratch_heights(config: StateLoopConfig) -> tuple[int, ...]:
    """Return the rows of each field of `_WarpgroupScratch`."""
    return config.head_k_dim, CHUNK, CHUNK, CHUNK


def chunk_states_shape(b: int, h: int, t: int, k_dim: int, v_dim: int) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the states of all chunks."""
    return jax.ShapeDtypeStruct((b, h, t // CHUNK, k_dim, v_dim), jnp.bfloat16)


def delta_forward_loop(
    config: StateLoopConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    initial_state: Ref,
    out: Ref,
    final_state: Ref,
    residuals: ResidualRefs | None,
) -> None:
    """Process the chunks of one head forward in time, with a decay per token.

    Args:
        config: Sizes.
        tokens: References to q, k, v and the inverses, [T, width] each.
        vectors: References [T] to the cumulative decays for queries and keys, if there are any, to erase and to write.
        initial_state: Reference [K, V].
        out: Reference [T, V].
        final_state: Reference [K, V].
        residuals: Where U and the states are stored; None: they are not stored.
    """

    def chunk(scratch, columns, time, step, refs, vectors, states):
        (state,), (q, k, v, inverse), scratch = states, refs, _WarpgroupScratch(*scratch)
        *gates, erase, write = vectors
        _store_state(scratch, state.astype(v.dtype), step, columns, residuals)
        (retrieved,) = wgmma_accumulate((zero_accumulator(*WG_SHAPE), (k, scratch.state)))
        strength = plgpu.load(erase, layout=WGMMA_ROW)
        from_start: Any = None
        if gates:
            from_start = jnp.exp2(plgpu.load(gates[0], layout=WGMMA_ROW))
            strength *= from_start
        plgpu.wait_smem_to_gmem(0 if residuals is None else 1, wait_read_only=True)
        rhs = load_smem_f32(v.at[:, columns]) * broadcast_per_row(plgpu.load(write, layout=WGMMA_ROW), WG_SHAPE)
        rhs -= retrieved * broadcast_per_row(strength, WG_SHAPE)
        others = (
            (zero_accumulator(*CHUNK_SHAPE), (q, k.transpose((1, 0)))),
            (zero_accumulator(*WG_SHAPE), (q, scratch.state)),
        )
        v_new, scores, read = apply_inverse(inverse, rhs, (scratch.hi, scratch.lo), *others)
        scores = (_decay_scores(scores, gates) * config.scale).astype(v.dtype)
        read *= config.scale
        scratch.hi[...] = v_new.astype(v.dtype)
        update = scratch.hi
        if gates:
            chunk_decay = plgpu.load(gates[0].at[CHUNK - 1])
            to_end = jnp.exp2(chunk_decay - plgpu.load(gates[1], layout=WGMMA_ROW))
            scratch.lo[...] = (v_new * broadcast_per_row(to_end, WG_SHAPE)).astype(v.dtype)
            update = scratch.lo
            read *= broadcast_per_row(from_start, WG_SHAPE)
            state *= jnp.exp2(chunk_decay)
        plgpu.commit_smem()
        chunk_out, state = wgmma_accumulate((read, (scores, scratch.hi)), (state, (k.transpose((1, 0)), update)))
        _store_output(scratch, chunk_out.astype(v.dtype), out, time, columns, residuals)
        return [state]

    heights = _scratch_heights(config)
    state_chunk_loop(config, chunk, tokens, vectors, [initial_state], [final_state], heights, reverse=False)


def delta_backward_loop(
    config: StateLoopConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    final_state_grad: Ref,
    initial_state_grad: Ref,
    residuals: ResidualRefs,
) -> None:
    """Process the chunks of one head backward in time, with a decay per token.

    Args:
        config: Sizes.
        tokens: References to q, k, the gradient of the output and the inverses, [T, width] each.
        vectors: References [T] to the cumulative decays for queries and keys, if there are any, and to erase.
        final_state_grad: Reference [K, V].
        initial_state_grad: Reference [K, V].
        residuals: Where dW and the gradients of the states are stored.
    """

    def chunk(scratch, columns, time, step, refs, vectors, states):
        (state,), (q, k, out_grad, inverse), scratch = states, refs, _WarpgroupScratch(*scratch)
        *gates, erase = vectors
        out_grad = out_grad.at[:, columns]
        dtype = out_grad.dtype
        _store_state(scratch, state.astype(dtype), step, columns, residuals)
        scores, write_grad = wgmma_accumulate(
            (zero_accumulator(*CHUNK_SHAPE), (k, q.transpose((1, 0)))),
            (zero_accumulator(*WG_SHAPE), (k, scratch.state)),
        )
        scores = (_decay_scores(scores, gates, transposed=True) * config.scale).astype(dtype)
        strength = plgpu.load(erase, layout=WGMMA_ROW)
        decayed_grad = load_smem_f32(out_grad) * config.scale
        if gates:
            chunk_decay = plgpu.load(gates[0].at[CHUNK - 1])
            from_start = jnp.exp2(plgpu.load(gates[0], layout=WGMMA_ROW))
            to_end = jnp.exp2(chunk_decay - plgpu.load(gates[1], layout=WGMMA_ROW))
            write_grad *= broadcast_per_row(to_end, WG_SHAPE)
            decayed_grad *= broadcast_per_row(from_start, WG_SHAPE)
            strength *= from_start
            state *= jnp.exp2(chunk_decay)
        (write_grad,) = wgmma_accumulate((write_grad, (scores, out_grad)))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (write_grad,) = apply_inverse(inverse, write_grad, (scratch.hi, scratch.lo), transposed=True)
        scratch.hi[...] = (write_grad * broadcast_per_row(-strength, WG_SHAPE)).astype(dtype)
        scratch.lo[...] = decayed_grad.astype(dtype)
        scratch.out[...] = write_grad.astype(dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem((scratch.out, residuals.v_new.at[time, columns]))
        (state,) = wgmma_accumulate((state, (k.transpose((1, 0)), scratch.hi), (q.transpose((1, 0)), scratch.lo)))
        plgpu.commit_smem()  # before the chunk is released
        return [state]

    heights = _scratch_heights(config)
    state_chunk_loop(config, chunk, tokens, vectors, [final_state_grad], [initial_state_grad], heights, reverse=True)


def delta_channel_forward_loop(
    config: StateLoopConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    initial_state: Ref,
    out: Ref,
    final_state: Ref,
    residuals: ResidualRefs | None,
) -> None:
    """Process the chunks of one head forward in time, with a decay per channel.

    Args:
        config: Sizes.
        tokens: References to the decayed queries, erase keys and keys, to v, the scores and the inverses, [T, width]
            each.
        vectors: References to the decays of the state over the chunks [N * K] and to write [T].
        initial_state: Reference [K, V].
        out: Reference [T, V].
        final_state: Reference [K, V].
        residuals: Where U and the states are stored; None: they are not stored.
    """

    def chunk(scratch, columns, time, step, refs, vectors, states):
        (state,), (q, erase_k, k, v, scores, inverse), scratch = states, refs, _WarpgroupScratch(*scratch)
        chunk_decay, write = vectors
        _store_state(scratch, state.astype(v.dtype), step, columns, residuals)
        (retrieved,) = wgmma_accumulate((zero_accumulator(*WG_SHAPE), (erase_k, scratch.state)))
        plgpu.wait_smem_to_gmem(0 if residuals is None else 1, wait_read_only=True)
        rhs = load_smem_f32(v.at[:, columns]) * broadcast_per_row(plgpu.load(write, layout=WGMMA_ROW), WG_SHAPE)
        rhs -= retrieved
        read = zero_accumulator(*WG_SHAPE), (q, scratch.state)
        v_new, read = apply_inverse(inverse, rhs, (scratch.hi, scratch.lo), read)
        scratch.hi[...] = v_new.astype(v.dtype)
        state *= broadcast_per_row(plgpu.load(chunk_decay, layout=WGMMA_ROW), state.shape)
        plgpu.commit_smem()
        chunk_out, state = wgmma_accumulate((read, (scores, scratch.hi)), (state, (k.transpose((1, 0)), scratch.hi)))
        _store_output(scratch, chunk_out.astype(v.dtype), out, time, columns, residuals)
        return [state]

    heights = _scratch_heights(config)
    state_chunk_loop(config, chunk, tokens, vectors, [initial_state], [final_state], heights, reverse=False)


def delta_channel_backward_loop(
    config: StateLoopConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    final_state_grad: Ref,
    initial_state_grad: Ref,
    residuals: ResidualRefs,
) -> None:
    """Process the chunks of one head backward in time, with a decay per channel.

    Args:
        config: Sizes.
        tokens: References as in `delta_channel_forward_loop`, with the gradient of the output in place of v.
        vectors: Reference to the decays of the state over the chunks [N * K].
        final_state_grad: Reference [K, V].
        initial_state_grad: Reference [K, V].
        residuals: Where dW and the gradients of the states are stored.
    """

    def chunk(scratch, columns, time, step, refs, vectors, states):
        (state,), (q, erase_k, k, out_grad, scores, inverse), scratch = states, refs, _WarpgroupScratch(*scratch)
        out_grad = out_grad.at[:, columns]
        dtype = out_grad.dtype
        _store_state(scratch, state.astype(dtype), step, columns, residuals)
        products = (k, scratch.state), (scores.transpose((1, 0)), out_grad)
        (write_grad,) = wgmma_accumulate((zero_accumulator(*WG_SHAPE), *products))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (write_grad,) = apply_inverse(inverse, write_grad, (scratch.hi, scratch.lo), transposed=True)
        scratch.hi[...] = (-write_grad).astype(dtype)
        scratch.out[...] = write_grad.astype(dtype)
        state *= broadcast_per_row(plgpu.load(vectors[0], layout=WGMMA_ROW), state.shape)
        plgpu.commit_smem()
        copy_smem_to_gmem((scratch.out, residuals.v_new.at[time, columns]))
        products = (erase_k.transpose((1, 0)), scratch.hi), (q.transpose((1, 0)), out_grad)
        (state,) = wgmma_accumulate((state, *products))
        plgpu.commit_smem()  # before the chunk is released
        return [state]

    heights = _scratch_heights(config)
    state_chunk_loop(config, chunk, tokens, vectors, [final_state_grad], [initial_state_grad], heights, reverse=True)


def _decay_scores(scores, gates, *, transposed=False):
    """Decay scores of queries (rows) and keys (columns), or transposed, and set those of later keys to 0."""
    i, j = row_and_column_iota(CHUNK_SHAPE)
    visible = i <= j if transposed else i >= j
    if not gates:
        return jnp.where(visible, scores, 0.0)
    query, key = gates
    if not transposed:
        return scores * pair_decay(plgpu.load(query, layout=WGMMA_ROW), key, visible)
    log2_decay = broadcast_per_column(plgpu.load(query, layout=WGMMA_COL), CHUNK_SHAPE)
    log2_decay = log2_decay - broadcast_per_row(plgpu.load(key, layout=WGMMA_ROW), CHUNK_SHAPE)
    return scores * jnp.exp2(jnp.where(visible, log2_decay, -jnp.inf))


def _store_state(scratch: _WarpgroupScratch, state, step, columns, residuals):
    """Store the state at the border of a chunk as an operand, and in global memory if there are residuals."""
    if residuals is not None:
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copy of the state
    scratch.state[...] = state
    plgpu.commit_smem()
    if residuals is not None:
        copy_smem_to_gmem((scratch.state, residuals.states.at[step, :, columns]))


def _store_output(scratch: _WarpgroupScratch, chunk_out, out, time, columns, residuals):
    """Store the output of a chunk in global memory, and U, which is in `scratch.hi`, if there are residuals."""
    copies = [] if residuals is None else [(scratch.hi, residuals.v_new.at[time, columns])]
    scratch.out[...] = chunk_out
    plgpu.commit_smem()
    copy_smem_to_gmem((scratch.out, out.at[time, columns]), *copies)
