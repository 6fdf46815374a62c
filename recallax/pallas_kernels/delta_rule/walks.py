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

from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    COLUMNS,
    MATRIX,
    ROWS,
    Ref,
    accumulate,
    along_columns,
    along_rows,
    digits,
    exactly,
    load,
    matrix,
    pipelined,
    rows_and_columns,
    send,
    unknown_zero,
    zeros,
)
from recallax.pallas_kernels.mosaic_gpu_solve import HALVES

OWN = 64
"""Columns of a warpgroup."""
SQUARE = (CHUNK, CHUNK)


class Walk(NamedTuple):
    """Sizes of one head's walk over time."""

    tokens: int
    width: int
    values: int
    scale: float
    interpret: bool

    @property
    def workers(self) -> int:
        """Computing warpgroups."""
        return self.values // OWN


class Kept(NamedTuple):
    """Where a walk leaves what the gradients need, in global memory."""

    solved: Ref
    """[T, V]: U, or dW."""
    states: Ref
    """[N, K, V]: S before each chunk, or dS behind it, in bfloat16."""


class _Room(NamedTuple):
    """Shared memory of one warpgroup."""

    held: Ref
    """The state as an operand."""
    high: Ref
    low: Ref
    """The right-hand sides in digits; then operands of the state's update."""
    staged: Ref


def ascend(
    sizes: Walk, tokens: list[Ref], vectors: list[Ref], start: Ref, out: Ref, final: Ref, kept: Kept | None
) -> None:
    """Forward in time.

    tokens: q, k, v and the inverses, [T, width] each. vectors: the gates if there are any, then erase and write.
    """

    def chunk(room, columns, time, step, refs, gates, states):
        (state,), (q, k, v, inverse) = states, refs
        room = _Room(*room)
        held, high, low, _ = room
        *gates, erase, write = gates
        _hold(room, state.astype(v.dtype), step, columns, kept)
        shape = (CHUNK, OWN)
        (recalled,) = accumulate((zeros(*shape), (k, held)), interpret=sizes.interpret)
        erased = plgpu.load(erase, layout=ROWS)
        if gates:
            since = jnp.exp2(plgpu.load(gates[0], layout=ROWS))
            erased *= since
        plgpu.wait_smem_to_gmem(0 if kept is None else 1, wait_read_only=True)
        wanted = load(v.at[:, columns]) * along_rows(plgpu.load(write, layout=ROWS), shape)
        wanted -= recalled * along_rows(erased, shape)
        others = (zeros(*SQUARE), (q, k.transpose((1, 0)))), (zeros(*shape), (q, held))
        new, scores, read = solved(inverse, wanted, (room.high, room.low), sizes.interpret, *others)
        scores = (_decayed(scores, gates) * sizes.scale).astype(v.dtype)
        read *= sizes.scale
        high[...] = new.astype(v.dtype)
        arriving = high
        if gates:
            last = plgpu.load(gates[0].at[CHUNK - 1])
            left = jnp.exp2(last - plgpu.load(gates[1], layout=ROWS))
            low[...] = (new * along_rows(left, shape)).astype(v.dtype)
            arriving = low
            read *= along_rows(since, shape)
            state *= jnp.exp2(last)
        plgpu.commit_smem()
        part, state = accumulate(
            (read, (scores, high)), (state, (k.transpose((1, 0)), arriving)), interpret=sizes.interpret
        )
        _answer(room, part.astype(v.dtype), out, time, columns, kept)
        return [state]

    walk(sizes, chunk, tokens, vectors, [start], [final], _heights(sizes), reverse=False)


def descend(sizes: Walk, tokens: list[Ref], vectors: list[Ref], start: Ref, final: Ref, kept: Kept) -> None:
    """Backward in time. tokens: q, k, the output's gradient and the inverses. vectors: the gates if any, then erase."""

    def chunk(room, columns, time, step, refs, gates, states):
        (state,), (q, k, grad, inverse) = states, refs
        room = _Room(*room)
        held, high, low, staged = room
        *gates, erase = gates
        grad = grad.at[:, columns]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        held[...] = state.astype(grad.dtype)
        plgpu.commit_smem()
        send((held, kept.states.at[step, :, columns]))
        shape = (CHUNK, OWN)
        scores, slope = accumulate(
            (zeros(*SQUARE), (k, q.transpose((1, 0)))), (zeros(*shape), (k, held)), interpret=sizes.interpret
        )
        scores = (_decayed(scores, gates, transposed=True) * sizes.scale).astype(grad.dtype)
        erased = plgpu.load(erase, layout=ROWS)
        arriving = load(grad) * sizes.scale
        if gates:
            last = plgpu.load(gates[0].at[CHUNK - 1])
            since = jnp.exp2(plgpu.load(gates[0], layout=ROWS))
            slope *= along_rows(jnp.exp2(last - plgpu.load(gates[1], layout=ROWS)), shape)
            arriving *= along_rows(since, shape)
            erased *= since
            state *= jnp.exp2(last)
        (slope,) = accumulate((slope, (scores, grad)), interpret=sizes.interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (slope,) = solved(inverse, slope, (room.high, room.low), sizes.interpret, transposed=True)
        high[...] = (slope * along_rows(-erased, shape)).astype(grad.dtype)
        low[...] = arriving.astype(grad.dtype)
        staged[...] = slope.astype(grad.dtype)
        plgpu.commit_smem()
        send((staged, kept.solved.at[time, columns]))
        (state,) = accumulate(
            (state, (k.transpose((1, 0)), high), (q.transpose((1, 0)), low)), interpret=sizes.interpret
        )
        plgpu.commit_smem()  # before the chunk is released
        return [state]

    walk(sizes, chunk, tokens, vectors, [start], [final], _heights(sizes), reverse=True)


def walk(
    sizes: Walk,
    chunk: Callable[..., list[jax.Array]],
    tokens: list[Ref],
    vectors: list[Ref],
    starts: list[Ref],
    finals: list[Ref],
    heights: tuple[int, ...],
    *,
    reverse: bool,
) -> None:
    """Call chunk(room, columns, time, step, tokens, vectors, states) -> states for each chunk.

    room: as many matrices in shared memory as there are heights, each of a warpgroup's columns.
    """
    worker, count = lax.axis_index("worker"), sizes.tokens // CHUNK
    columns = pl.ds(worker * OWN, OWN)

    def order(step):
        return count - 1 - step if reverse else step

    def scoped(*rooms):
        def context(pipeline):
            states = pipeline([plgpu.load(x.at[:, columns], layout=MATRIX, optimized=False) for x in starts])
            for final, state in zip(finals, states, strict=True):
                final[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def body(index, *refs):
            *refs, states = refs
            step = order(index[0])
            room = [x.at[unknown_zero(index[0]), worker] for x in rooms]
            tokens_here, vectors_here = refs[: len(tokens)], refs[len(tokens) :]
            return chunk(room, columns, pl.ds(step * CHUNK, CHUNK), step, tokens_here, vectors_here, states)

        pipelined(body, tokens, vectors, context, sizes.workers, OWN, 1, order)

    rooms = [matrix(1, sizes.workers, height, OWN, tile=OWN) for height in heights]
    pl.run_scoped(scoped, *rooms, collective_axes="worker")


def _heights(sizes):
    """Of a `_Room`."""
    return sizes.width, CHUNK, CHUNK, CHUNK


def _decayed(scores, gates, *, transposed=False):
    """Scores of queries along the rows, or the columns, times what is left of their keys by then; 0 for later keys."""
    i, j = rows_and_columns(SQUARE)
    seen = i <= j if transposed else i >= j
    if not gates:
        return jnp.where(seen, scores, 0.0)
    query, key = gates
    if transposed:
        gap = along_columns(plgpu.load(query, layout=COLUMNS), SQUARE) - along_rows(
            plgpu.load(key, layout=ROWS), SQUARE
        )
    else:
        gap = along_rows(plgpu.load(query, layout=ROWS), SQUARE) - along_columns(
            plgpu.load(key, layout=COLUMNS), SQUARE
        )
    return scores * jnp.exp2(jnp.where(seen, gap, -jnp.inf))


def _hold(room, state, step, columns, kept):
    """The state before a chunk as an operand, and in global memory where it is kept."""
    if kept is not None:
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copy of the state
    room.held[...] = state
    plgpu.commit_smem()
    if kept is not None:
        send((room.held, kept.states.at[step, :, columns]))


def _answer(room, part, out, time, columns, kept):
    """A chunk's output to global memory, and U, which stands in `room.high`, where it is kept."""
    copies = [] if kept is None else [(room.high, kept.solved.at[time, columns])]
    room.staged[...] = part
    plgpu.commit_smem()
    send((room.staged, out.at[time, columns]), *copies)


def solved(
    inverse: Ref, x: jax.Array, room: tuple[Ref, Ref], interpret: bool, *others: Any, transposed: bool = False
) -> list[jax.Array]:
    """T x, or T^T x, and other sums. Overwrites the room for digits, and leaves it free to be overwritten."""
    for ref, part in zip(room, digits(x, interpret), strict=True):
        ref[...] = part
    plgpu.commit_smem()
    parts = [inverse.at[:, half] for half in HALVES]
    if transposed:
        parts = [part.transpose((1, 0)) for part in parts]
    products = exactly((parts[0], parts[1]), room)
    sums = accumulate((zeros(*x.shape), *products), *others, interpret=interpret)
    plgpu.commit_smem()  # all warps have read
    return sums


def ascend_decayed(
    sizes: Walk, tokens: list[Ref], vectors: list[Ref], start: Ref, out: Ref, final: Ref, kept: Kept | None
) -> None:
    """Forward in time, where chunks have done all that depends on decays.

    tokens: queries, what erases, and keys, all decayed, v, the queries' scores and the inverses, [T, width] each.
    vectors: what is left of the state behind each chunk, [N * K], and write.
    """

    def chunk(room, columns, time, step, refs, vectors, states):
        (state,), (q, e, k, v, scores, inverse) = states, refs
        room, (stays, write) = _Room(*room), vectors
        held, high, *_ = room
        _hold(room, state.astype(v.dtype), step, columns, kept)
        shape = (CHUNK, OWN)
        (recalled,) = accumulate((zeros(*shape), (e, held)), interpret=sizes.interpret)
        plgpu.wait_smem_to_gmem(0 if kept is None else 1, wait_read_only=True)
        wanted = load(v.at[:, columns]) * along_rows(plgpu.load(write, layout=ROWS), shape) - recalled
        new, read = solved(inverse, wanted, (room.high, room.low), sizes.interpret, (zeros(*shape), (q, held)))
        high[...] = new.astype(v.dtype)
        state *= along_rows(plgpu.load(stays, layout=ROWS), state.shape)
        plgpu.commit_smem()
        part, state = accumulate(
            (read, (scores, high)), (state, (k.transpose((1, 0)), high)), interpret=sizes.interpret
        )
        _answer(room, part.astype(v.dtype), out, time, columns, kept)
        return [state]

    walk(sizes, chunk, tokens, vectors, [start], [final], _heights(sizes), reverse=False)


def descend_decayed(sizes: Walk, tokens: list[Ref], vectors: list[Ref], start: Ref, final: Ref, kept: Kept) -> None:
    """Backward in time. Arguments as of `ascend_decayed`, with the output's gradient for v, and without write."""

    def chunk(room, columns, time, step, refs, vectors, states):
        (state,), (q, e, k, grad, scores, inverse) = states, refs
        room = _Room(*room)
        held, high, _, staged = room
        grad = grad.at[:, columns]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        held[...] = state.astype(grad.dtype)
        plgpu.commit_smem()
        send((held, kept.states.at[step, :, columns]))
        slope = zeros(CHUNK, OWN), (k, held), (scores.transpose((1, 0)), grad)
        (slope,) = accumulate(slope, interpret=sizes.interpret)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        (slope,) = solved(inverse, slope, (room.high, room.low), sizes.interpret, transposed=True)
        high[...] = (-slope).astype(grad.dtype)
        staged[...] = slope.astype(grad.dtype)
        state *= along_rows(plgpu.load(vectors[0], layout=ROWS), state.shape)
        plgpu.commit_smem()
        send((staged, kept.solved.at[time, columns]))
        (state,) = accumulate(
            (state, (e.transpose((1, 0)), high), (q.transpose((1, 0)), grad)), interpret=sizes.interpret
        )
        plgpu.commit_smem()  # before the chunk is released
        return [state]

    walk(sizes, chunk, tokens, vectors, [start], [final], _heights(sizes), reverse=True)
