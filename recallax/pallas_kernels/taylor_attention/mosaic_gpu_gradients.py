"""The gradients of BASED on Hopper: a walk for the states, one for their gradients, then each chunk for itself.

With g and d the gradients of numerators and denominators, s' = 1 + q.k, S and z the state before a chunk, and dS and dz
the gradients of that behind it,

    dV = phi(K) dS + F^T g         F = (1 + s'^2)/2, on and below the diagonal
    dphi(q) = S g + z d            dphi(k) = dS v + dz
    ds = s' (g.v + d)

where a feature is a product of two columns, so that its gradient goes to each times the other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.linear_attention.gates import Gates
from recallax.pallas_kernels.linear_attention.segments import cut, cut_gates, cut_last, join_last, starts, stays_of
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    COLUMNS,
    MATRIX,
    ROWS,
    accumulate,
    along_columns,
    along_rows,
    decayed_rows,
    launch,
    matrix,
    pipelined,
    rows_and_columns,
    send,
    unknown_zero,
    zeros,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu_features import (
    COLUMN,
    KEYS,
    QUERIES,
    TILE,
    TILES,
    VALUES,
    factors,
    features,
    picks,
    tile,
)


class Inputs(NamedTuple):
    """T is a multiple of the chunk; D = 32 columns, of which the first 16 are the channels and the next is ones."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H V"]
    state: Float[Array, "B H F V"]
    totals: Float[Array, "B H F"]


class _States(NamedTuple):
    """What a walk leaves: before each chunk, in its direction, and behind the last one."""

    chunks: Float[Array, "B H N F V"]
    chunk_totals: Float[Array, "B H N F"]
    state: Float[Array, "B H F V"]
    totals: Float[Array, "B H F"]


def gradients(
    inputs: Inputs,
    gates: Gates | None,
    grad: Float[Array, "B T H V"],
    total_grad: Float[Array, "B H T"],
    state_grad: Float[Array, "B H F V"],
    totals_grad: Float[Array, "B H F"],
    *,
    segments: int,
    interpret: bool,
) -> Inputs:
    """Of all inputs, from those of the numerators, the denominators, the final state and its sums."""
    q, k, v, state, totals = inputs
    ones = jnp.ones_like(total_grad)
    before = _all_states(k, v, ones, gates, state, totals, segments, interpret, reverse=False)
    behind = _all_states(q, grad, total_grad, gates, state_grad, totals_grad, segments, interpret, reverse=True)
    dq, dk, dv = _chunk_gradients(inputs, gates, grad, total_grad, before, behind, interpret)
    return Inputs(dq, dk, dv, behind.state, behind.totals)


def segment_starts(
    x: Float[Array, "B T H D"],
    y: Float[Array, "B T H V"],
    weights: Float[Array, "B H T"],
    gates: Gates | None,
    state: Float[Array, "B H F V"],
    totals: Float[Array, "B H F"],
    segments: int,
    *,
    reverse: bool,
    interpret: bool,
) -> tuple[Float[Array, "N H F V"], Float[Array, "N H F"]]:
    """The state and the totals that each of N = B * segments walks starts from; arguments as of `_states`."""
    if segments == 1:
        return state, totals
    empty, nothing = (jnp.zeros((segments * len(part), *part.shape[1:]), part.dtype) for part in (state, totals))
    own = cut(x, segments), cut(y, segments), cut_last(weights, segments), cut_gates(gates, segments)
    _, made, made_totals = _states(*own, empty, nothing, interpret, reverse=reverse, keep=False)
    left = jnp.ones((len(made), 1), jnp.float32) if gates is None else stays_of(gates, segments)
    return (
        starts(made, left[:, :, None, None], state, reverse=reverse),
        starts(made_totals, left[:, :, None], totals, reverse=reverse),
    )


def _all_states(x, y, weights, gates, state, totals, segments, interpret, *, reverse):
    """`_states`, over all segments of a row at once."""
    n = segments
    first = segment_starts(x, y, weights, gates, state, totals, n, reverse=reverse, interpret=interpret)
    own = cut(x, n), cut(y, n), cut_last(weights, n), cut_gates(gates, n)
    (chunks, chunk_totals), *ends = _states(*own, *first, interpret, reverse=reverse, keep=True)
    last = 0 if reverse else n - 1
    return _States(join_last(chunks, n), join_last(chunk_totals, n), *(part[last::n] for part in ends))


def _states(x, y, weights, gates, state, totals, interpret, *, reverse, keep):
    """What is kept of the walk, if anything, its last state and that one's totals.

    Sums of phi(x) y^T and of phi(x) times a weight, of keys and values or, in reverse, of queries and gradients.

    Each warpgroup has 64 of the features.
    """
    b, h, count = x.shape[0], x.shape[2], x.shape[1] // CHUNK

    def states(x, y, vectors, gates, picks, start, start_total, kept, final, final_total):
        row, head, worker = (lax.axis_index(name) for name in ("row", "head", "worker"))
        own = tile(worker)

        def order(step):
            return count - 1 - step if reverse else step

        def scoped(held, picked, masked, arrived):
            def context(pipeline):
                for n in range(3):
                    plgpu.copy_gmem_to_smem(picks.at[n, own], picked.at[0, worker, n], arrived.at[worker])
                plgpu.barrier_wait(arrived.at[worker])
                state = plgpu.load(start.at[row, head, own], layout=MATRIX, optimized=False)
                total = plgpu.load(start_total.at[row, head, own], layout=ROWS, optimized=False)
                final[row, head, own], final_total[row, head, own] = pipeline((state, total))
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, x, y, weight, *rest):
                *gates, (state, total) = rest
                step, zero = order(index[0]), unknown_zero(index[0])
                room = held.at[zero, worker]
                if keep:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    room[...] = state.astype(y.dtype)
                    kept[1][row, head, step, own] = total
                if gates:
                    last = plgpu.load(gates[0].at[CHUNK - 1])
                    reach = plgpu.load(gates[0], layout=ROWS)
                    reach = reach if reverse else last - plgpu.load(gates[1], layout=ROWS)
                    seen = masked.at[zero, worker]
                    seen[...] = decayed_rows(x, jnp.exp2(reach), interpret=interpret).astype(x.dtype)
                    state, total, x = state * jnp.exp2(last), total * jnp.exp2(last), seen
                plgpu.commit_smem()
                if keep:
                    send((room, kept[0].at[row, head, step, own]))
                phi = features(x, picked.at[zero, worker], 0, QUERIES if reverse else KEYS, interpret, transposed=True)
                weighted = phi * along_columns(plgpu.load(weight, layout=COLUMNS), phi.shape)
                (state,) = accumulate((state, (phi.astype(y.dtype), y)), interpret=interpret)
                plgpu.commit_smem()  # before the chunk is released
                return state, total + jnp.sum(weighted, axis=1)

            tokens, along = [z.at[row, :, head] for z in (x, y)], [vectors.at[row, head]]
            along += [gate.at[row, 0] for gate in gates]
            pipelined(chunk, tokens, along, context, TILES, None, 1, order)

        pl.run_scoped(
            scoped,
            matrix(1, TILES, TILE, VALUES, tile=64),
            matrix(1, TILES, 3, TILE, COLUMN, tile=COLUMN),
            matrix(1, TILES, CHUNK, COLUMN, tile=COLUMN),
            plgpu.Barrier(num_arrivals=3, num_barriers=TILES),
            collective_axes="worker",
        )

    wide = TILES * TILE
    chunks = (
        jax.ShapeDtypeStruct((b, h, count, wide, VALUES), y.dtype),
        jax.ShapeDtypeStruct((b, h, count, wide), jnp.float32),
    )
    return launch(
        states,
        name="states_back" if reverse else "states",
        out=(
            chunks if keep else (),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(totals.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        workers=TILES,
        interpret=interpret,
    )(x, y, weights, gates or (), picks(), state, totals)


def _chunk_gradients(inputs, gates, grad, total_grad, before, behind, interpret):
    """Of queries, keys and values."""
    q, k, v = inputs[:3]
    b, t, h, _ = q.shape

    def chunk_gradients(q, k, v, grad, total_grad, gates, picks, states, totals, dq, dk, dv):
        row, head, n = (lax.axis_index(name) for name in ("row", "head", "chunk"))
        time = pl.ds(n * CHUNK, CHUNK)

        def scoped(tokens, wide, held, sums, picked, kernel, slopes, vectors, arrived):
            copies = [(x.at[row, time, head], tokens.at[i]) for i, x in enumerate((q, k))]
            copies += [(x.at[row, time, head], wide.at[i]) for i, x in enumerate((v, grad))]
            copies += [(x.at[row, head, n], held.at[i]) for i, x in enumerate(states)]
            copies += [(x.at[row, head, n], sums.at[i]) for i, x in enumerate(totals)]
            copies += [(picks, picked), (total_grad.at[row, head, time], vectors.at[0])]
            copies += [(x.at[row, 0, time], vectors.at[1 + i]) for i, x in enumerate(gates)]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, arrived)
            plgpu.barrier_wait(arrived)
            here = [vectors.at[1 + i] for i in range(len(gates))]
            rooms = tokens, wide, held, sums, picked, kernel, slopes
            *narrow, values = _of_chunk(rooms, vectors.at[0], here, interpret)
            for i, x in enumerate(narrow):
                tokens.at[i][...] = x.astype(tokens.dtype)
            wide.at[0][...] = values.astype(wide.dtype)
            plgpu.commit_smem()
            targets = [x.at[row, time, head] for x in (dq, dk, dv)]
            send(*zip((tokens.at[0], tokens.at[1], wide.at[0]), targets, strict=True))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            matrix(2, CHUNK, COLUMN, tile=COLUMN),
            matrix(2, CHUNK, VALUES, tile=64),
            matrix(2, TILES * TILE, VALUES, tile=64),
            plgpu.SMEM((2, TILES * TILE), jnp.float32),
            matrix(3, TILES * TILE, COLUMN, tile=COLUMN),
            matrix(CHUNK, CHUNK, tile=64),
            matrix(CHUNK, CHUNK, tile=COLUMN),
            plgpu.SMEM((3, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=10 + len(gates)),
        )

    return launch(
        chunk_gradients,
        out=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        workers=1,
        copiers=0,
        interpret=interpret,
    )(
        q,
        k,
        v,
        grad,
        total_grad,
        gates or (),
        picks(),
        (before.chunks, behind.chunks),
        (before.chunk_totals, behind.chunk_totals),
    )


def _of_chunk(rooms, total_grad, gates, interpret):
    """dq, dk and dv of one chunk."""
    tokens, wide, held, sums, picked, kernel, slope = rooms
    (q, k), (v, grad), square = (tokens.at[0], tokens.at[1]), (wide.at[0], wide.at[1]), (CHUNK, CHUNK)
    dtype = wide.dtype
    scores, slopes = accumulate(
        (zeros(*square), (q, k.transpose((1, 0)))), (zeros(*square), (grad, v.transpose((1, 0)))), interpret=interpret
    )
    total_slope = plgpu.load(total_grad, layout=ROWS)
    slopes = scores * (slopes + along_rows(total_slope, square))
    scores = 0.5 + 0.5 * scores * scores
    i, j = rows_and_columns(square)
    read: Any = None
    left: Any = None
    if gates:
        rows = plgpu.load(gates[0], layout=ROWS)
        gap = along_rows(rows, square) - along_columns(plgpu.load(gates[1], layout=COLUMNS), square)
        decay = jnp.exp2(jnp.where(i >= j, gap, -jnp.inf))
        scores, slopes = scores * decay, slopes * decay
        read = jnp.exp2(rows)
        left = jnp.exp2(plgpu.load(gates[0].at[CHUNK - 1]) - plgpu.load(gates[1], layout=ROWS))
    for room, x in ((kernel, scores), (slope, slopes)):
        room[...] = (x if gates else jnp.where(i >= j, x, 0.0)).astype(dtype)
    plgpu.commit_smem()
    values, queries, keys = zeros(CHUNK, VALUES), zeros(CHUNK, COLUMN), zeros(CHUNK, COLUMN)

    def add(n, found):
        values, queries, keys = found
        for x, y, which, second, factor in ((q, grad, 0, QUERIES, total_slope), (k, v, 1, KEYS, None)):
            state = held.at[which, tile(n)]
            total = along_columns(plgpu.load(sums.at[which, tile(n)], layout=COLUMNS), square)
            total = total if factor is None else total * along_rows(factor, square)
            one, other = factors(x, picked, n, second, interpret)
            if which == 1:
                (values,) = accumulate((values, ((one * other).astype(dtype), state)), interpret=interpret)
            (change,) = accumulate((total, (y, state.transpose((1, 0)))), interpret=interpret)
            products = ((change * other).astype(dtype), picked.at[0, tile(n)])
            swapped = ((change * one).astype(dtype), picked.at[second, tile(n)])
            (added,) = accumulate((keys if which else queries, products, swapped), interpret=interpret)
            queries, keys = (queries, added) if which else (added, keys)
        return values, queries, keys

    values, queries, keys = lax.fori_loop(0, TILES, add, (values, queries, keys))
    if gates:
        values, keys = (x * along_rows(left, x.shape) for x in (values, keys))
        queries *= along_rows(read, queries.shape)
    queries, keys = accumulate((queries, (slope, k)), (keys, (slope.transpose((1, 0)), q)), interpret=interpret)
    (values,) = accumulate((values, (kernel.transpose((1, 0)), grad)), interpret=interpret)
    plgpu.commit_smem()  # all warps have read
    return queries, keys, values
