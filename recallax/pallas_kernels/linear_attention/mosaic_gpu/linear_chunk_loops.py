"""One head's walk over time, chunk by chunk, with the state in registers: what a block of threads does.

Forward in time it is linear attention, and with other arguments the gradient of the queries; backward in time it gives
the gradients of keys and values. `mosaic_gpu.py` has the formulas.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    chunk_pipeline,
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


class LinearKernelConfig(NamedTuple):
    """Sizes of one head's walk over time."""

    num_tokens: int
    head_k_dim: int
    head_v_dim: int
    scale: float
    interpret: bool
    num_consumer_wgs: int
    """Computing warpgroups: the state and each product's result are divided among them by columns."""

    @property
    def column_tile(self) -> int:
        """Columns that every matrix can be cut at."""
        return min(64, self.head_k_dim // self.num_consumer_wgs, self.head_v_dim // self.num_consumer_wgs)

    @property
    def warpgroup_index(self) -> jax.Array | int:
        """Which of them this is."""
        return lax.axis_index("worker")


def linear_forward_loop(config, tokens, gates, initial_state, out, *, final_state=None, decay_grad_sums=None):
    """One head forward in time.

    tokens: q, k and v as [T, width] each in global memory. With `decay_grad_sums` also x, as wide as v: the sums over columns of
    x times what the output owes to the state are written there, [workers, T] in float32, those of x times the rest
    too: what the decay's gradient needs.
    """
    workers, worker = config.num_consumer_wgs, config.warpgroup_index
    own = config.head_v_dim // workers
    columns = pl.ds(worker * own, own)

    def scoped(held, low, decayed, staged):
        def context(pipeline):
            state = pipeline(plgpu.load(initial_state.at[:, columns], layout=WGMMA, optimized=False))
            if final_state is not None:
                final_state[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def chunk(index, *refs):
            q, k, v, *x = refs[: len(tokens)]
            v, x = v.at[:, columns], x[0].at[:, columns] if x else None
            *gates, state = refs[len(tokens) :]
            room = [None if x is None else x.at[opaque_zero(index[0]), worker] for x in (held, low, decayed)]
            part, part_sums, state = _linear_forward_chunk(config, (q, k, v, x), gates, state, room)
            time = pl.ds(index[0] * CHUNK, CHUNK)
            if decay_grad_sums is not None:
                decay_grad_sums[worker, time] = part_sums
            store_through_smem((staged.at[worker], part, out.at[time, columns]))
            return state

        ahead = 3 if decay_grad_sums is None and config.head_k_dim + config.head_v_dim == 2 * 64 else 1
        chunk_pipeline(chunk, tokens, gates, context, workers, config.column_tile, ahead, chunk_order=lambda step: step)

    state = smem_matrix(1, workers, config.head_k_dim, own, tile=config.column_tile)
    decayed, staged = (smem_matrix(*shape, CHUNK, own, tile=config.column_tile) for shape in ((1, workers), (workers,)))
    pl.run_scoped(scoped, state, None if decay_grad_sums is None else state, decayed, staged, collective_axes="worker")


def _linear_forward_chunk(config, tokens, gates, state, scratch):
    """One chunk's output, its sums with x, and the state behind it.

    room: for the state as an operand, for the digits that it loses so or None, and for the values as they reach the
    chunk's end.
    """
    (q, k, v, x), (held, low, decayed) = tokens, scratch
    square, shape, dtype, interpret = (CHUNK, CHUNK), v.shape, v.dtype, config.interpret
    held[...] = state.astype(dtype)
    if gates:
        rows, last = plgpu.load(gates[0], layout=WGMMA_ROW), plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - plgpu.load(gates[1], layout=WGMMA_ROW))
        decayed[...] = scale_rows(v, left, interpret=interpret).astype(dtype)
    else:
        decayed = v
    if x is not None:
        low[...] = (state - round_to_dtype(state, dtype, interpret)).astype(dtype)
    plgpu.commit_smem()
    query, key = row_and_column_iota(square)
    seen = query >= key

    def decayed_scores(scores):
        if not gates:
            return jnp.where(seen, scores, 0.0)
        gap = broadcast_per_row(rows, square) - broadcast_per_column(plgpu.load(gates[1], layout=WGMMA_COL), square)
        return scores * jnp.exp2(jnp.where(seen, gap, -jnp.inf))

    scores, out = (zero_accumulator(*square), (q, k.transpose((1, 0)))), (zero_accumulator(*shape), (q, held))
    sums = None
    if x is None:
        scores, out = wgmma_accumulate(scores, out, interpret=interpret)
        scores = decayed_scores(scores).astype(dtype)
    else:  # in two steps, or registers run out
        scores, others = wgmma_accumulate(
            scores, (zero_accumulator(*square), (x, v.transpose((1, 0)))), interpret=interpret
        )
        scores = decayed_scores(scores)
        sums = jnp.sum(scores * others, axis=1) * config.scale
        scores = scores.astype(dtype)
        (out,) = wgmma_accumulate((*out, (q, low)), interpret=interpret)
        seen_by = scale_rows(x, jnp.exp2(rows), interpret=interpret, scale=config.scale)
        sums += jnp.sum(out * seen_by, axis=1)
    if gates:
        out *= broadcast_per_row(jnp.exp2(rows), shape)
        state *= jnp.exp2(last)
    out, state = wgmma_accumulate((out, (scores, v)), (state, (k.transpose((1, 0)), decayed)), interpret=interpret)
    return (out * config.scale).astype(dtype), sums, state


def linear_backward_loop(config, tokens, gates, final_state_grad, dk, dv, initial_state_grad, decay_grad_sums):
    """One head backward in time: the gradients of k, v and the state, given the final state's.

    tokens: q, k, v and the output's gradient, [T, width] each in global memory. sums: where to write the sums over
    columns of k times its gradient, [workers, T], or None. Each warpgroup owns columns of dv and of the state's
    gradient, and columns of dk.
    """
    workers, worker = config.num_consumer_wgs, config.warpgroup_index
    keys, own = config.head_k_dim // workers, config.head_v_dim // workers
    key_columns, columns = pl.ds(worker * keys, keys), pl.ds(worker * own, own)

    def scoped(held, low, decayed, staged, published):
        def context(pipeline):
            state = pipeline(plgpu.load(final_state_grad.at[:, columns], layout=WGMMA, optimized=False))
            initial_state_grad[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def meet():
            if workers > 1:
                plgpu.barrier_arrive(published)
                plgpu.barrier_wait(published)

        def chunk(index, q, k, v, grad, *rest):
            *gates, state = rest
            zero = opaque_zero(index[0])
            room = held.at[zero], None if low is None else low.at[zero], decayed.at[zero]
            dk_part, dv_part, part_sums, state = _linear_backward_chunk(
                config, (q, k, v, grad), gates, state, room, meet
            )
            time = pl.ds((last - index[0]) * CHUNK, CHUNK)
            if decay_grad_sums is not None:
                decay_grad_sums[worker, time] = part_sums
            if low is not None and staged is None:  # shared memory is short: where the state's lower digits were
                staged_k, staged_v = (low.at[zero, worker, pl.ds(i * CHUNK, CHUNK)] for i in range(2))
            else:
                staged_k, staged_v = (x.at[zero, worker] for x in staged)
            store_through_smem((staged_k, dk_part, dk.at[time, key_columns]), (staged_v, dv_part, dv.at[time, columns]))
            return state

        last = config.tokens // CHUNK - 1
        chunk_pipeline(
            chunk, tokens, gates, context, workers, config.column_tile, 1, chunk_order=lambda step: last - step
        )

    state = smem_matrix(1, workers, config.head_k_dim, own, tile=config.column_tile)
    staged = None
    if decay_grad_sums is None or workers == 1 or keys != own:
        staged = tuple(smem_matrix(1, workers, CHUNK, columns, tile=config.column_tile) for columns in (keys, own))
    pl.run_scoped(
        scoped,
        state,
        None if decay_grad_sums is None else state,
        smem_matrix(1, CHUNK, config.head_k_dim, tile=config.column_tile),
        staged,
        plgpu.Barrier(num_arrivals=workers),
        collective_axes="worker",
    )


def _linear_backward_chunk(config, tokens, gates, state, scratch, sync_warpgroups):
    """One chunk's gradients of k and v, the sums for the gates, and the gradient of the state before it.

    Matrices of pairs have keys along the rows and queries along the columns. room: for the state's gradient as an
    operand, for the digits that it loses so or None, and for the queries as they reach the chunk's start, of all
    warpgroups; `sync_warpgroups` makes these wait for each other.
    """
    (q, k, v, grad), (held, low, decayed) = tokens, scratch
    square, interpret, workers, worker = (
        (CHUNK, CHUNK),
        config.interpret,
        config.num_consumer_wgs,
        config.warpgroup_index,
    )
    keys, own = config.head_k_dim // workers, config.head_v_dim // workers
    key_columns, columns = pl.ds(worker * keys, keys), pl.ds(worker * own, own)
    dtype = v.dtype
    if gates:
        since = jnp.exp2(plgpu.load(gates[0], layout=WGMMA_ROW))
        arriving = scale_rows(q.at[:, key_columns], since, interpret=interpret, scale=config.scale)
    else:
        arriving = load_smem_f32(q.at[:, key_columns]) * config.scale
    decayed.at[:, key_columns][...] = arriving.astype(dtype)
    scores, slopes = wgmma_accumulate(
        (zero_accumulator(*square), (k, q.transpose((1, 0)))),
        (zero_accumulator(*square), (v, grad.transpose((1, 0)))),
        interpret=interpret,
    )
    key, query = row_and_column_iota(square)
    seen = key <= query
    sums: Any = None
    if gates:
        rows = plgpu.load(gates[1], layout=WGMMA_ROW)
        gap = broadcast_per_column(plgpu.load(gates[0], layout=WGMMA_COL), square) - broadcast_per_row(rows, square)
        decay = jnp.exp2(jnp.where(seen, gap, -jnp.inf)) * config.scale
        scores *= decay
        if low is not None:
            sums = jnp.sum(scores * slopes, axis=1) / workers
        slopes *= decay
    else:
        # Not a product with a mask of 0 and 1: the compiler would keep that in registers from chunk to chunk.
        scores, slopes = (jnp.where(seen, x * config.scale, 0.0) for x in (scores, slopes))
    scores, slopes = scores.astype(dtype), slopes.astype(dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    held.at[worker][...] = state.astype(dtype)
    if low is not None:
        low.at[worker][...] = (state - round_to_dtype(state, dtype, interpret)).astype(dtype)
    plgpu.commit_smem()
    sync_warpgroups()
    states = [held] if low is None else [held, low]
    blocks = [(i, pl.ds(i * own, own)) for i in range(workers)]
    from_keys = k, held.at[worker]
    from_values = [(v.at[:, block], x.at[i, key_columns].transpose((1, 0))) for x in states for i, block in blocks]
    within_values, within_keys = (scores, grad.at[:, columns]), (slopes, q.at[:, key_columns])
    update = decayed.transpose((1, 0)), grad.at[:, columns]
    dv, dk = zero_accumulator(CHUNK, own), zero_accumulator(CHUNK, keys)
    if gates:  # one after another, or registers run out
        last = plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - rows)
        (dv,) = wgmma_accumulate((dv, from_keys), interpret=interpret)
        dv, state = wgmma_accumulate(
            (dv * broadcast_per_row(left, dv.shape), within_values),
            (state * jnp.exp2(last), update),
            interpret=interpret,
        )
        dv = dv.astype(dtype)
        (dk,) = wgmma_accumulate((dk, *from_values), interpret=interpret)
        if low is not None:
            sums += jnp.sum(dk * scale_rows(k.at[:, key_columns], left, interpret=interpret), axis=1)
        (dk,) = wgmma_accumulate((dk * broadcast_per_row(left, dk.shape), within_keys), interpret=interpret)
    else:
        dv, dk, state = wgmma_accumulate(
            (dv, from_keys, within_values), (dk, *from_values, within_keys), (state, update), interpret=interpret
        )
    sync_warpgroups()  # before any of them overwrites what the others read
    return dk.astype(dtype), dv.astype(dtype), sums, state
