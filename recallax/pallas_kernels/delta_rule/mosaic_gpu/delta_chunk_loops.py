"""One head's walks over time for the delta rule, chunk by chunk, with the state in registers.

Forward in time, from the state S before a chunk and the chunk's inverse T, and backward from the gradient dS behind it:

    U = T (w V - b 2^L K S)                               O = scale (2^L Q S + (Q K^T * D) U)
    S <- 2^L_C S + K^T (2^(L_C - L) U)
    dW = T^T (scale (Q K^T * D)^T dO + 2^(L_C - L) K dS)
    dS <- 2^L_C dS + Q^T (scale 2^L dO) - K^T (b 2^L dW)

with D_ij = 2^(L_i - L_j) for j <= i. U are the values that are written, dW is the gradient of w V. Each warpgroup has
64 columns of the values and of the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import HI_LO_COLUMNS
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Ref,
    broadcast_per_column,
    broadcast_per_row,
    chunk_pipeline,
    copy_smem_to_gmem,
    hi_lo_products,
    hi_lo_split,
    load_smem_f32,
    opaque_zero,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

WG_COLUMNS = 64
"""Columns of a warpgroup."""
CHUNK_SHAPE = (CHUNK, CHUNK)


class DeltaKernelConfig(NamedTuple):
    """Sizes of one head's walk over time."""

    num_tokens: int
    head_k_dim: int
    head_v_dim: int
    scale: float
    interpret: bool

    @property
    def num_consumer_wgs(self) -> int:
        """Computing warpgroups."""
        return self.head_v_dim // WG_COLUMNS


class DeltaResiduals(NamedTuple):
    """Where a walk leaves what the gradients need, in global memory."""

    v_new: Ref
    """[T, V]: U, or dW."""
    states: Ref
    """[N, K, V]: S before each chunk, or dS behind it, in bfloat16."""


class _WarpgroupScratch(NamedTuple):
    """Shared memory of one warpgroup."""

    state: Ref
    """The state as an operand."""
    hi: Ref
    lo: Ref
    """The right-hand sides in digits; then operands of the state's update."""
    out: Ref


def delta_forward_loop(
    config: DeltaKernelConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    initial_state: Ref,
    out: Ref,
    final_state: Ref,
    residuals: DeltaResiduals | None,
) -> None:
    """Forward in time.

    tokens: q, k, v and the inverses, [T, width] each. vectors: the gates if there are any, then erase and write.
    """

    def chunk(room, columns, time, step, refs, gates, states):
        (state,), (q, k, v, inverse) = states, refs
        room = _WarpgroupScratch(*room)
        held, high, low, _ = room
        *gates, erase, write = gates
        _stage_state(room, state.astype(v.dtype), step, columns, residuals)
        shape = (CHUNK, WG_COLUMNS)
        (recalled,) = wgmma_accumulate((zero_accumulator(*shape), (k, held)), interpret=config.interpret)
        erased = plgpu.load(erase, layout=WGMMA_ROW)
        if gates:
            since = jnp.exp2(plgpu.load(gates[0], layout=WGMMA_ROW))
            erased *= since
        plgpu.wait_smem_to_gmem(0 if residuals is None else 1, wait_read_only=True)
        wanted = load_smem_f32(v.at[:, columns]) * broadcast_per_row(plgpu.load(write, layout=WGMMA_ROW), shape)
        wanted -= recalled * broadcast_per_row(erased, shape)
        others = (zero_accumulator(*CHUNK_SHAPE), (q, k.transpose((1, 0)))), (zero_accumulator(*shape), (q, held))
        new, scores, read = apply_inverse(inverse, wanted, (room.hi, room.lo), config.interpret, *others)
        scores = (_decay_scores(scores, gates) * config.scale).astype(v.dtype)
        read *= config.scale
        high[...] = new.astype(v.dtype)
        arriving = high
        if gates:
            last = plgpu.load(gates[0].at[CHUNK - 1])
            left = jnp.exp2(last - plgpu.load(gates[1], layout=WGMMA_ROW))
            low[...] = (new * broadcast_per_row(left, shape)).astype(v.dtype)
            arriving = low
            read *= broadcast_per_row(since, shape)
            state *= jnp.exp2(last)
        plgpu.commit_smem()
        part, state = wgmma_accumulate(
            (read, (scores, high)), (state, (k.transpose((1, 0)), arriving)), interpret=config.interpret
        )
        _store_output(room, part.astype(v.dtype), out, time, columns, residuals)
        return [state]

    state_chunk_loop(
        config, chunk, tokens, vectors, [initial_state], [final_state], _scratch_heights(config), reverse=False
    )


def delta_backward_loop(
    config: DeltaKernelConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    final_state_grad: Ref,
    initial_state_grad: Ref,
    residuals: DeltaResiduals,
) -> None:
    """Backward in time. tokens: q, k, the output's gradient and the inverses. vectors: the gates if any, then erase."""

    def chunk(room, columns, time, step, refs, gates, states):
        (state,), (q, k, grad, inverse) = states, refs
        room = _WarpgroupScratch(*room)
        held, high, low, staged = room
        *gates, erase = gates
        grad = grad.at[:, columns]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        held[...] = state.astype(grad.dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem((held, residuals.states.at[step, :, columns]))
        shape = (CHUNK, WG_COLUMNS)
        scores, slope = wgmma_accumulate(
            (zero_accumulator(*CHUNK_SHAPE), (k, q.transpose((1, 0)))),
            (zero_accumulator(*shape), (k, held)),
            interpret=config.interpret,
        )
        scores = (_decay_scores(scores, gates, transposed=True) * config.scale).astype(grad.dtype)
        erased = plgpu.load(erase, layout=WGMMA_ROW)
        arriving = load_smem_f32(grad) * config.scale
        if gates:
            last = plgpu.load(gates[0].at[CHUNK - 1])
            since = jnp.exp2(plgpu.load(gates[0], layout=WGMMA_ROW))
            slope *= broadcast_per_row(jnp.exp2(last - plgpu.load(gates[1], layout=WGMMA_ROW)), shape)
            arriving *= broadcast_per_row(since, shape)
            erased *= since
            state *= jnp.exp2(last)
        (slope,) = wgmma_accumulate((slope, (scores, grad)), interpret=config.interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (slope,) = apply_inverse(inverse, slope, (room.hi, room.lo), config.interpret, transposed=True)
        high[...] = (slope * broadcast_per_row(-erased, shape)).astype(grad.dtype)
        low[...] = arriving.astype(grad.dtype)
        staged[...] = slope.astype(grad.dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem((staged, residuals.v_new.at[time, columns]))
        (state,) = wgmma_accumulate(
            (state, (k.transpose((1, 0)), high), (q.transpose((1, 0)), low)), interpret=config.interpret
        )
        plgpu.commit_smem()  # before the chunk is released
        return [state]

    state_chunk_loop(
        config, chunk, tokens, vectors, [final_state_grad], [initial_state_grad], _scratch_heights(config), reverse=True
    )


def state_chunk_loop(
    config: DeltaKernelConfig,
    chunk: Callable[..., list[jax.Array]],
    tokens: list[Ref],
    vectors: list[Ref],
    initial_states: list[Ref],
    final_states: list[Ref],
    scratch_heights: tuple[int, ...],
    *,
    reverse: bool,
) -> None:
    """Call chunk(room, columns, time, step, tokens, vectors, states) -> states for each chunk.

    room: as many matrices in shared memory as there are heights, each of a warpgroup's columns.
    """
    worker, count = lax.axis_index("worker"), config.num_tokens // CHUNK
    columns = pl.ds(worker * WG_COLUMNS, WG_COLUMNS)

    def order(step):
        return count - 1 - step if reverse else step

    def scoped(*rooms):
        def context(pipeline):
            states = pipeline([plgpu.load(x.at[:, columns], layout=WGMMA, optimized=False) for x in initial_states])
            for final, state in zip(final_states, states, strict=True):
                final[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def body(index, *refs):
            *refs, states = refs
            step = order(index[0])
            room = [x.at[opaque_zero(index[0]), worker] for x in rooms]
            tokens_here, vectors_here = refs[: len(tokens)], refs[len(tokens) :]
            return chunk(room, columns, pl.ds(step * CHUNK, CHUNK), step, tokens_here, vectors_here, states)

        chunk_pipeline(body, tokens, vectors, context, config.num_consumer_wgs, WG_COLUMNS, 1, order)

    rooms = [smem_matrix(1, config.num_consumer_wgs, height, WG_COLUMNS, tile=WG_COLUMNS) for height in scratch_heights]
    pl.run_scoped(scoped, *rooms, collective_axes="worker")


def _scratch_heights(config):
    """Of a `_WarpgroupScratch`."""
    return config.head_k_dim, CHUNK, CHUNK, CHUNK


def _decay_scores(scores, gates, *, transposed=False):
    """Scores of queries along the rows, or the columns, times what is left of their keys by then; 0 for later keys."""
    i, j = row_and_column_iota(CHUNK_SHAPE)
    seen = i <= j if transposed else i >= j
    if not gates:
        return jnp.where(seen, scores, 0.0)
    query, key = gates
    if transposed:
        gap = broadcast_per_column(plgpu.load(query, layout=WGMMA_COL), CHUNK_SHAPE) - broadcast_per_row(
            plgpu.load(key, layout=WGMMA_ROW), CHUNK_SHAPE
        )
    else:
        gap = broadcast_per_row(plgpu.load(query, layout=WGMMA_ROW), CHUNK_SHAPE) - broadcast_per_column(
            plgpu.load(key, layout=WGMMA_COL), CHUNK_SHAPE
        )
    return scores * jnp.exp2(jnp.where(seen, gap, -jnp.inf))


def _stage_state(scratch, state, step, columns, residuals):
    """The state before a chunk as an operand, and in global memory where it is kept."""
    if residuals is not None:
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copy of the state
    scratch.state[...] = state
    plgpu.commit_smem()
    if residuals is not None:
        copy_smem_to_gmem((scratch.state, residuals.states.at[step, :, columns]))


def _store_output(scratch, part, out, time, columns, residuals):
    """A chunk's output to global memory, and U, which stands in `room.high`, where it is kept."""
    copies = [] if residuals is None else [(scratch.hi, residuals.v_new.at[time, columns])]
    scratch.out[...] = part
    plgpu.commit_smem()
    copy_smem_to_gmem((scratch.out, out.at[time, columns]), *copies)


def apply_inverse(
    inverse: Ref, x: jax.Array, scratch: tuple[Ref, Ref], interpret: bool, *others: Any, transposed: bool = False
) -> list[jax.Array]:
    """T x, or T^T x, and other sums. Overwrites the room for digits, and leaves it free to be overwritten."""
    for ref, part in zip(scratch, hi_lo_split(x, interpret), strict=True):
        ref[...] = part
    plgpu.commit_smem()
    parts = [inverse.at[:, half] for half in HI_LO_COLUMNS]
    if transposed:
        parts = [part.transpose((1, 0)) for part in parts]
    products = hi_lo_products((parts[0], parts[1]), scratch)
    sums = wgmma_accumulate((zero_accumulator(*x.shape), *products), *others, interpret=interpret)
    plgpu.commit_smem()  # all warps have read
    return sums


def delta_channel_forward_loop(
    config: DeltaKernelConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    initial_state: Ref,
    out: Ref,
    final_state: Ref,
    residuals: DeltaResiduals | None,
) -> None:
    """Forward in time, where chunks have done all that depends on decays.

    tokens: queries, what erases, and keys, all decayed, v, the queries' scores and the inverses, [T, width] each.
    vectors: what is left of the state behind each chunk, [N * K], and write.
    """

    def chunk(room, columns, time, step, refs, vectors, states):
        (state,), (q, e, k, v, scores, inverse) = states, refs
        room, (stays, write) = _WarpgroupScratch(*room), vectors
        held, high, *_ = room
        _stage_state(room, state.astype(v.dtype), step, columns, residuals)
        shape = (CHUNK, WG_COLUMNS)
        (recalled,) = wgmma_accumulate((zero_accumulator(*shape), (e, held)), interpret=config.interpret)
        plgpu.wait_smem_to_gmem(0 if residuals is None else 1, wait_read_only=True)
        wanted = (
            load_smem_f32(v.at[:, columns]) * broadcast_per_row(plgpu.load(write, layout=WGMMA_ROW), shape) - recalled
        )
        new, read = apply_inverse(
            inverse, wanted, (room.hi, room.lo), config.interpret, (zero_accumulator(*shape), (q, held))
        )
        high[...] = new.astype(v.dtype)
        state *= broadcast_per_row(plgpu.load(stays, layout=WGMMA_ROW), state.shape)
        plgpu.commit_smem()
        part, state = wgmma_accumulate(
            (read, (scores, high)), (state, (k.transpose((1, 0)), high)), interpret=config.interpret
        )
        _store_output(room, part.astype(v.dtype), out, time, columns, residuals)
        return [state]

    state_chunk_loop(
        config, chunk, tokens, vectors, [initial_state], [final_state], _scratch_heights(config), reverse=False
    )


def delta_channel_backward_loop(
    config: DeltaKernelConfig,
    tokens: list[Ref],
    vectors: list[Ref],
    final_state_grad: Ref,
    initial_state_grad: Ref,
    residuals: DeltaResiduals,
) -> None:
    """Backward in time. Arguments as of `delta_channel_forward_loop`, with the output's gradient for v, and without write."""

    def chunk(room, columns, time, step, refs, vectors, states):
        (state,), (q, e, k, grad, scores, inverse) = states, refs
        room = _WarpgroupScratch(*room)
        held, high, _, staged = room
        grad = grad.at[:, columns]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        held[...] = state.astype(grad.dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem((held, residuals.states.at[step, :, columns]))
        slope = zero_accumulator(CHUNK, WG_COLUMNS), (k, held), (scores.transpose((1, 0)), grad)
        (slope,) = wgmma_accumulate(slope, interpret=config.interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (slope,) = apply_inverse(inverse, slope, (room.hi, room.lo), config.interpret, transposed=True)
        high[...] = (-slope).astype(grad.dtype)
        staged[...] = slope.astype(grad.dtype)
        state *= broadcast_per_row(plgpu.load(vectors[0], layout=WGMMA_ROW), state.shape)
        plgpu.commit_smem()
        copy_smem_to_gmem((staged, residuals.v_new.at[time, columns]))
        (state,) = wgmma_accumulate(
            (state, (e.transpose((1, 0)), high), (q.transpose((1, 0)), grad)), interpret=config.interpret
        )
        plgpu.commit_smem()  # before the chunk is released
        return [state]

    state_chunk_loop(
        config, chunk, tokens, vectors, [final_state_grad], [initial_state_grad], _scratch_heights(config), reverse=True
    )
