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

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    merge_rows_head_major,
    propagate_split_states,
    split_decay,
    split_gates,
    split_rows,
    split_rows_head_major,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    chunk_pipeline,
    copy_smem_to_gmem,
    launch_kernel,
    opaque_zero,
    row_and_column_iota,
    scale_rows,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import (
    FEATURE_TILE,
    HEAD_V_DIM,
    KEY_SELECTION,
    NUM_FEATURE_TILES,
    PADDED_HEAD_K_DIM,
    QUERY_SELECTION,
    feature_factors,
    feature_tile,
    selection_matrices,
    tile_slice,
)


class TaylorKernelInputs(NamedTuple):
    """T is a multiple of the chunk; D = 32 columns, of which the first 16 are the channels and the next is ones."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H V"]
    state: Float[Array, "B H F V"]
    z: Float[Array, "B H F"]


class _TaylorChunkStates(NamedTuple):
    """What a walk leaves: before each chunk, in its direction, and behind the last one."""

    chunk_states: Float[Array, "B H N F V"]
    chunk_z: Float[Array, "B H N F"]
    state: Float[Array, "B H F V"]
    z: Float[Array, "B H F"]


def taylor_attention_grads(
    inputs: TaylorKernelInputs,
    gates: CumulativeDecay | None,
    grad: Float[Array, "B T H V"],
    denominator_grad: Float[Array, "B H T"],
    state_grad: Float[Array, "B H F V"],
    z_grad: Float[Array, "B H F"],
    *,
    num_splits: int,
    interpret: bool,
) -> TaylorKernelInputs:
    """Of all inputs, from those of the numerators, the denominators, the final state and its sums."""
    q, k, v, state, totals = inputs
    ones = jnp.ones_like(denominator_grad)
    before = _chunk_states_of_splits(k, v, ones, gates, state, totals, num_splits, interpret, reverse=False)
    behind = _chunk_states_of_splits(
        q, grad, denominator_grad, gates, state_grad, z_grad, num_splits, interpret, reverse=True
    )
    dq, dk, dv = _launch_chunk_grads(inputs, gates, grad, denominator_grad, before, behind, interpret)
    return TaylorKernelInputs(dq, dk, dv, behind.state, behind.z)


def taylor_split_states(
    x: Float[Array, "B T H D"],
    y: Float[Array, "B T H V"],
    weights: Float[Array, "B H T"],
    gates: CumulativeDecay | None,
    state: Float[Array, "B H F V"],
    z: Float[Array, "B H F"],
    num_splits: int,
    *,
    reverse: bool,
    interpret: bool,
) -> tuple[Float[Array, "N H F V"], Float[Array, "N H F"]]:
    """The state and the totals that each of N = B * segments walks starts from; arguments as of `_launch_chunk_states`."""
    if num_splits == 1:
        return state, z
    empty, nothing = (jnp.zeros((num_splits * len(part), *part.shape[1:]), part.dtype) for part in (state, z))
    own = (
        split_rows(x, num_splits),
        split_rows(y, num_splits),
        split_rows_head_major(weights, num_splits),
        split_gates(gates, num_splits),
    )
    _, made, made_totals = _launch_chunk_states(*own, empty, nothing, interpret, reverse=reverse, save_states=False)
    left = jnp.ones((len(made), 1), jnp.float32) if gates is None else split_decay(gates, num_splits)
    return (
        propagate_split_states(made, left[:, :, None, None], state, reverse=reverse),
        propagate_split_states(made_totals, left[:, :, None], z, reverse=reverse),
    )


def _chunk_states_of_splits(x, y, weights, gates, state, z, num_splits, interpret, *, reverse):
    """`_launch_chunk_states`, over all segments of a row at once."""
    n = num_splits
    first = taylor_split_states(x, y, weights, gates, state, z, n, reverse=reverse, interpret=interpret)
    own = split_rows(x, n), split_rows(y, n), split_rows_head_major(weights, n), split_gates(gates, n)
    (chunks, chunk_totals), *ends = _launch_chunk_states(*own, *first, interpret, reverse=reverse, save_states=True)
    last = 0 if reverse else n - 1
    return _TaylorChunkStates(
        merge_rows_head_major(chunks, n), merge_rows_head_major(chunk_totals, n), *(part[last::n] for part in ends)
    )


def _launch_chunk_states(x, y, weights, gates, state, initial_z, interpret, *, reverse, save_states):
    """What is kept of the walk, if anything, its last state and that one's totals.

    Sums of phi(x) y^T and of phi(x) times a weight, of keys and values or, in reverse, of queries and gradients.

    Each warpgroup has 64 of the features.
    """
    b, h, count = x.shape[0], x.shape[2], x.shape[1] // CHUNK

    def states(x, y, vectors, gates, picks, start, start_total, kept, final, final_total):
        row, head, worker = (lax.axis_index(name) for name in ("row", "head", "worker"))
        own = tile_slice(worker)

        def order(step):
            return count - 1 - step if reverse else step

        def scoped(held, picked, masked, arrived):
            def context(pipeline):
                for n in range(3):
                    plgpu.copy_gmem_to_smem(picks.at[n, own], picked.at[0, worker, n], arrived.at[worker])
                plgpu.barrier_wait(arrived.at[worker])
                state = plgpu.load(start.at[row, head, own], layout=WGMMA, optimized=False)
                total = plgpu.load(start_total.at[row, head, own], layout=WGMMA_ROW, optimized=False)
                final[row, head, own], final_total[row, head, own] = pipeline((state, total))
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, x, y, weight, *rest):
                *gates, (state, total) = rest
                step, zero = order(index[0]), opaque_zero(index[0])
                room = held.at[zero, worker]
                if save_states:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    room[...] = state.astype(y.dtype)
                    kept[1][row, head, step, own] = total
                if gates:
                    last = plgpu.load(gates[0].at[CHUNK - 1])
                    reach = plgpu.load(gates[0], layout=WGMMA_ROW)
                    reach = reach if reverse else last - plgpu.load(gates[1], layout=WGMMA_ROW)
                    seen = masked.at[zero, worker]
                    seen[...] = scale_rows(x, jnp.exp2(reach), interpret=interpret).astype(x.dtype)
                    state, total, x = state * jnp.exp2(last), total * jnp.exp2(last), seen
                plgpu.commit_smem()
                if save_states:
                    copy_smem_to_gmem((room, kept[0].at[row, head, step, own]))
                phi = feature_tile(
                    x,
                    picked.at[zero, worker],
                    0,
                    QUERY_SELECTION if reverse else KEY_SELECTION,
                    interpret,
                    transposed=True,
                )
                weighted = phi * broadcast_per_column(plgpu.load(weight, layout=WGMMA_COL), phi.shape)
                (state,) = wgmma_accumulate((state, (phi.astype(y.dtype), y)), interpret=interpret)
                plgpu.commit_smem()  # before the chunk is released
                return state, total + jnp.sum(weighted, axis=1)

            tokens, along = [z.at[row, :, head] for z in (x, y)], [vectors.at[row, head]]
            along += [gate.at[row, 0] for gate in gates]
            chunk_pipeline(chunk, tokens, along, context, NUM_FEATURE_TILES, None, 1, order)

        pl.run_scoped(
            scoped,
            smem_matrix(1, NUM_FEATURE_TILES, FEATURE_TILE, HEAD_V_DIM, tile=64),
            smem_matrix(1, NUM_FEATURE_TILES, 3, FEATURE_TILE, PADDED_HEAD_K_DIM, tile=PADDED_HEAD_K_DIM),
            smem_matrix(1, NUM_FEATURE_TILES, CHUNK, PADDED_HEAD_K_DIM, tile=PADDED_HEAD_K_DIM),
            plgpu.Barrier(num_arrivals=3, num_barriers=NUM_FEATURE_TILES),
            collective_axes="worker",
        )

    wide = NUM_FEATURE_TILES * FEATURE_TILE
    chunks = (
        jax.ShapeDtypeStruct((b, h, count, wide, HEAD_V_DIM), y.dtype),
        jax.ShapeDtypeStruct((b, h, count, wide), jnp.float32),
    )
    return launch_kernel(
        states,
        name="states_back" if reverse else "states",
        out_type=(
            chunks if save_states else (),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(initial_z.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        num_consumer_wgs=NUM_FEATURE_TILES,
        interpret=interpret,
    )(x, y, weights, gates or (), selection_matrices(), state, initial_z)


def _launch_chunk_grads(inputs, gates, grad, denominator_grad, before, after, interpret):
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
            *narrow, values = _chunk_grads(rooms, vectors.at[0], here, interpret)
            for i, x in enumerate(narrow):
                tokens.at[i][...] = x.astype(tokens.dtype)
            wide.at[0][...] = values.astype(wide.dtype)
            plgpu.commit_smem()
            targets = [x.at[row, time, head] for x in (dq, dk, dv)]
            copy_smem_to_gmem(*zip((tokens.at[0], tokens.at[1], wide.at[0]), targets, strict=True))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(2, CHUNK, PADDED_HEAD_K_DIM, tile=PADDED_HEAD_K_DIM),
            smem_matrix(2, CHUNK, HEAD_V_DIM, tile=64),
            smem_matrix(2, NUM_FEATURE_TILES * FEATURE_TILE, HEAD_V_DIM, tile=64),
            plgpu.SMEM((2, NUM_FEATURE_TILES * FEATURE_TILE), jnp.float32),
            smem_matrix(3, NUM_FEATURE_TILES * FEATURE_TILE, PADDED_HEAD_K_DIM, tile=PADDED_HEAD_K_DIM),
            smem_matrix(CHUNK, CHUNK, tile=64),
            smem_matrix(CHUNK, CHUNK, tile=PADDED_HEAD_K_DIM),
            plgpu.SMEM((3, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=10 + len(gates)),
        )

    return launch_kernel(
        chunk_gradients,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(
        q,
        k,
        v,
        grad,
        denominator_grad,
        gates or (),
        selection_matrices(),
        (before.chunk_states, after.chunk_states),
        (before.chunk_z, after.chunk_z),
    )


def _chunk_grads(scratch, denominator_grad, gates, interpret):
    """dq, dk and dv of one chunk."""
    tokens, wide, held, sums, picked, kernel, slope = scratch
    (q, k), (v, grad), square = (tokens.at[0], tokens.at[1]), (wide.at[0], wide.at[1]), (CHUNK, CHUNK)
    dtype = wide.dtype
    scores, slopes = wgmma_accumulate(
        (zero_accumulator(*square), (q, k.transpose((1, 0)))),
        (zero_accumulator(*square), (grad, v.transpose((1, 0)))),
        interpret=interpret,
    )
    total_slope = plgpu.load(denominator_grad, layout=WGMMA_ROW)
    slopes = scores * (slopes + broadcast_per_row(total_slope, square))
    scores = 0.5 + 0.5 * scores * scores
    i, j = row_and_column_iota(square)
    read: Any = None
    left: Any = None
    if gates:
        rows = plgpu.load(gates[0], layout=WGMMA_ROW)
        gap = broadcast_per_row(rows, square) - broadcast_per_column(plgpu.load(gates[1], layout=WGMMA_COL), square)
        decay = jnp.exp2(jnp.where(i >= j, gap, -jnp.inf))
        scores, slopes = scores * decay, slopes * decay
        read = jnp.exp2(rows)
        left = jnp.exp2(plgpu.load(gates[0].at[CHUNK - 1]) - plgpu.load(gates[1], layout=WGMMA_ROW))
    for room, x in ((kernel, scores), (slope, slopes)):
        room[...] = (x if gates else jnp.where(i >= j, x, 0.0)).astype(dtype)
    plgpu.commit_smem()
    values, queries, keys = (
        zero_accumulator(CHUNK, HEAD_V_DIM),
        zero_accumulator(CHUNK, PADDED_HEAD_K_DIM),
        zero_accumulator(CHUNK, PADDED_HEAD_K_DIM),
    )

    def add(n, found):
        values, queries, keys = found
        for x, y, which, second, factor in ((q, grad, 0, QUERY_SELECTION, total_slope), (k, v, 1, KEY_SELECTION, None)):
            state = held.at[which, tile_slice(n)]
            total = broadcast_per_column(plgpu.load(sums.at[which, tile_slice(n)], layout=WGMMA_COL), square)
            total = total if factor is None else total * broadcast_per_row(factor, square)
            one, other = feature_factors(x, picked, n, second, interpret)
            if which == 1:
                (values,) = wgmma_accumulate((values, ((one * other).astype(dtype), state)), interpret=interpret)
            (change,) = wgmma_accumulate((total, (y, state.transpose((1, 0)))), interpret=interpret)
            products = ((change * other).astype(dtype), picked.at[0, tile_slice(n)])
            swapped = ((change * one).astype(dtype), picked.at[second, tile_slice(n)])
            (added,) = wgmma_accumulate((keys if which else queries, products, swapped), interpret=interpret)
            queries, keys = (queries, added) if which else (added, keys)
        return values, queries, keys

    values, queries, keys = lax.fori_loop(0, NUM_FEATURE_TILES, add, (values, queries, keys))
    if gates:
        values, keys = (x * broadcast_per_row(left, x.shape) for x in (values, keys))
        queries *= broadcast_per_row(read, queries.shape)
    queries, keys = wgmma_accumulate((queries, (slope, k)), (keys, (slope.transpose((1, 0)), q)), interpret=interpret)
    (values,) = wgmma_accumulate((values, (kernel.transpose((1, 0)), grad)), interpret=interpret)
    plgpu.commit_smem()  # all warps have read
    return queries, keys, values
