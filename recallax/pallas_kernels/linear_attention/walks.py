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

from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    COLUMNS,
    MATRIX,
    ROWS,
    accumulate,
    along_columns,
    along_rows,
    decayed_rows,
    load,
    matrix,
    pipelined,
    rounded,
    rows_and_columns,
    unknown_zero,
    write,
    zeros,
)


class Walk(NamedTuple):
    """Sizes of one head's walk over time."""

    tokens: int
    width: int
    values: int
    scale: float
    interpret: bool
    workers: int
    """Computing warpgroups: the state and each product's result are divided among them by columns."""

    @property
    def tile(self) -> int:
        """Columns that every matrix can be cut at."""
        return min(64, self.width // self.workers, self.values // self.workers)

    @property
    def worker(self) -> jax.Array | int:
        """Which of them this is."""
        return lax.axis_index("worker")


def ascend(sizes, tokens, gates, start, out, *, final=None, sums=None):
    """One head forward in time.

    tokens: q, k and v as [T, width] each in global memory. With `sums` also x, as wide as v: the sums over columns of
    x times what the output owes to the state are written there, [workers, T] in float32, those of x times the rest
    too: what the decay's gradient needs.
    """
    workers, worker = sizes.workers, sizes.worker
    own = sizes.values // workers
    columns = pl.ds(worker * own, own)

    def scoped(held, low, decayed, staged):
        def context(pipeline):
            state = pipeline(plgpu.load(start.at[:, columns], layout=MATRIX, optimized=False))
            if final is not None:
                final[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def chunk(index, *refs):
            q, k, v, *x = refs[: len(tokens)]
            v, x = v.at[:, columns], x[0].at[:, columns] if x else None
            *gates, state = refs[len(tokens) :]
            room = [None if x is None else x.at[unknown_zero(index[0]), worker] for x in (held, low, decayed)]
            part, part_sums, state = _ascend_chunk(sizes, (q, k, v, x), gates, state, room)
            time = pl.ds(index[0] * CHUNK, CHUNK)
            if sums is not None:
                sums[worker, time] = part_sums
            write((staged.at[worker], part, out.at[time, columns]))
            return state

        ahead = 3 if sums is None and sizes.width + sizes.values == 2 * 64 else 1
        pipelined(chunk, tokens, gates, context, workers, sizes.tile, ahead, order=lambda step: step)

    state = matrix(1, workers, sizes.width, own, tile=sizes.tile)
    decayed, staged = (matrix(*shape, CHUNK, own, tile=sizes.tile) for shape in ((1, workers), (workers,)))
    pl.run_scoped(scoped, state, None if sums is None else state, decayed, staged, collective_axes="worker")


def _ascend_chunk(sizes, tokens, gates, state, room):
    """One chunk's output, its sums with x, and the state behind it.

    room: for the state as an operand, for the digits that it loses so or None, and for the values as they reach the
    chunk's end.
    """
    (q, k, v, x), (held, low, decayed) = tokens, room
    square, shape, dtype, interpret = (CHUNK, CHUNK), v.shape, v.dtype, sizes.interpret
    held[...] = state.astype(dtype)
    if gates:
        rows, last = plgpu.load(gates[0], layout=ROWS), plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - plgpu.load(gates[1], layout=ROWS))
        decayed[...] = decayed_rows(v, left, interpret=interpret).astype(dtype)
    else:
        decayed = v
    if x is not None:
        low[...] = (state - rounded(state, dtype, interpret)).astype(dtype)
    plgpu.commit_smem()
    query, key = rows_and_columns(square)
    seen = query >= key

    def decayed_scores(scores):
        if not gates:
            return jnp.where(seen, scores, 0.0)
        gap = along_rows(rows, square) - along_columns(plgpu.load(gates[1], layout=COLUMNS), square)
        return scores * jnp.exp2(jnp.where(seen, gap, -jnp.inf))

    scores, out = (zeros(*square), (q, k.transpose((1, 0)))), (zeros(*shape), (q, held))
    sums = None
    if x is None:
        scores, out = accumulate(scores, out, interpret=interpret)
        scores = decayed_scores(scores).astype(dtype)
    else:  # in two steps, or registers run out
        scores, others = accumulate(scores, (zeros(*square), (x, v.transpose((1, 0)))), interpret=interpret)
        scores = decayed_scores(scores)
        sums = jnp.sum(scores * others, axis=1) * sizes.scale
        scores = scores.astype(dtype)
        (out,) = accumulate((*out, (q, low)), interpret=interpret)
        seen_by = decayed_rows(x, jnp.exp2(rows), interpret=interpret, scale=sizes.scale)
        sums += jnp.sum(out * seen_by, axis=1)
    if gates:
        out *= along_rows(jnp.exp2(rows), shape)
        state *= jnp.exp2(last)
    out, state = accumulate((out, (scores, v)), (state, (k.transpose((1, 0)), decayed)), interpret=interpret)
    return (out * sizes.scale).astype(dtype), sums, state


def descend(sizes, tokens, gates, start, dk, dv, final, sums):
    """One head backward in time: the gradients of k, v and the state, given the final state's.

    tokens: q, k, v and the output's gradient, [T, width] each in global memory. sums: where to write the sums over
    columns of k times its gradient, [workers, T], or None. Each warpgroup owns columns of dv and of the state's
    gradient, and columns of dk.
    """
    workers, worker = sizes.workers, sizes.worker
    keys, own = sizes.width // workers, sizes.values // workers
    key_columns, columns = pl.ds(worker * keys, keys), pl.ds(worker * own, own)

    def scoped(held, low, decayed, staged, published):
        def context(pipeline):
            state = pipeline(plgpu.load(start.at[:, columns], layout=MATRIX, optimized=False))
            final[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def meet():
            if workers > 1:
                plgpu.barrier_arrive(published)
                plgpu.barrier_wait(published)

        def chunk(index, q, k, v, grad, *rest):
            *gates, state = rest
            zero = unknown_zero(index[0])
            room = held.at[zero], None if low is None else low.at[zero], decayed.at[zero]
            dk_part, dv_part, part_sums, state = _descend_chunk(sizes, (q, k, v, grad), gates, state, room, meet)
            time = pl.ds((last - index[0]) * CHUNK, CHUNK)
            if sums is not None:
                sums[worker, time] = part_sums
            if low is not None and staged is None:  # shared memory is short: where the state's lower digits were
                staged_k, staged_v = (low.at[zero, worker, pl.ds(i * CHUNK, CHUNK)] for i in range(2))
            else:
                staged_k, staged_v = (x.at[zero, worker] for x in staged)
            write((staged_k, dk_part, dk.at[time, key_columns]), (staged_v, dv_part, dv.at[time, columns]))
            return state

        last = sizes.tokens // CHUNK - 1
        pipelined(chunk, tokens, gates, context, workers, sizes.tile, 1, order=lambda step: last - step)

    state = matrix(1, workers, sizes.width, own, tile=sizes.tile)
    staged = None
    if sums is None or workers == 1 or keys != own:
        staged = tuple(matrix(1, workers, CHUNK, columns, tile=sizes.tile) for columns in (keys, own))
    pl.run_scoped(
        scoped,
        state,
        None if sums is None else state,
        matrix(1, CHUNK, sizes.width, tile=sizes.tile),
        staged,
        plgpu.Barrier(num_arrivals=workers),
        collective_axes="worker",
    )


def _descend_chunk(sizes, tokens, gates, state, room, meet):
    """One chunk's gradients of k and v, the sums for the gates, and the gradient of the state before it.

    Matrices of pairs have keys along the rows and queries along the columns. room: for the state's gradient as an
    operand, for the digits that it loses so or None, and for the queries as they reach the chunk's start, of all
    warpgroups; `meet` makes these wait for each other.
    """
    (q, k, v, grad), (held, low, decayed) = tokens, room
    square, interpret, workers, worker = (CHUNK, CHUNK), sizes.interpret, sizes.workers, sizes.worker
    keys, own = sizes.width // workers, sizes.values // workers
    key_columns, columns = pl.ds(worker * keys, keys), pl.ds(worker * own, own)
    dtype = v.dtype
    if gates:
        since = jnp.exp2(plgpu.load(gates[0], layout=ROWS))
        arriving = decayed_rows(q.at[:, key_columns], since, interpret=interpret, scale=sizes.scale)
    else:
        arriving = load(q.at[:, key_columns]) * sizes.scale
    decayed.at[:, key_columns][...] = arriving.astype(dtype)
    scores, slopes = accumulate(
        (zeros(*square), (k, q.transpose((1, 0)))), (zeros(*square), (v, grad.transpose((1, 0)))), interpret=interpret
    )
    key, query = rows_and_columns(square)
    seen = key <= query
    sums: Any = None
    if gates:
        rows = plgpu.load(gates[1], layout=ROWS)
        gap = along_columns(plgpu.load(gates[0], layout=COLUMNS), square) - along_rows(rows, square)
        decay = jnp.exp2(jnp.where(seen, gap, -jnp.inf)) * sizes.scale
        scores *= decay
        if low is not None:
            sums = jnp.sum(scores * slopes, axis=1) / workers
        slopes *= decay
    else:
        # Not a product with a mask of 0 and 1: the compiler would keep that in registers from chunk to chunk.
        scores, slopes = (jnp.where(seen, x * sizes.scale, 0.0) for x in (scores, slopes))
    scores, slopes = scores.astype(dtype), slopes.astype(dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    held.at[worker][...] = state.astype(dtype)
    if low is not None:
        low.at[worker][...] = (state - rounded(state, dtype, interpret)).astype(dtype)
    plgpu.commit_smem()
    meet()
    states = [held] if low is None else [held, low]
    blocks = [(i, pl.ds(i * own, own)) for i in range(workers)]
    from_keys = k, held.at[worker]
    from_values = [(v.at[:, block], x.at[i, key_columns].transpose((1, 0))) for x in states for i, block in blocks]
    within_values, within_keys = (scores, grad.at[:, columns]), (slopes, q.at[:, key_columns])
    update = decayed.transpose((1, 0)), grad.at[:, columns]
    dv, dk = zeros(CHUNK, own), zeros(CHUNK, keys)
    if gates:  # one after another, or registers run out
        last = plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - rows)
        (dv,) = accumulate((dv, from_keys), interpret=interpret)
        dv, state = accumulate(
            (dv * along_rows(left, dv.shape), within_values), (state * jnp.exp2(last), update), interpret=interpret
        )
        dv = dv.astype(dtype)
        (dk,) = accumulate((dk, *from_values), interpret=interpret)
        if low is not None:
            sums += jnp.sum(dk * decayed_rows(k.at[:, key_columns], left, interpret=interpret), axis=1)
        (dk,) = accumulate((dk * along_rows(left, dk.shape), within_keys), interpret=interpret)
    else:
        dv, dk, state = accumulate(
            (dv, from_keys, within_values), (dk, *from_values, within_keys), (state, update), interpret=interpret
        )
    meet()  # before any of them overwrites what the others read
    return dk.astype(dtype), dv.astype(dtype), sums, state
