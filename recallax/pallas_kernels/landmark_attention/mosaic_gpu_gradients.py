"""The gradients of landmark attention on Hopper: one pass for queries, one for keys and values.

With D = do.o, o_b = sum_j r_bj v_j, p from the saved logarithm of the sum and r computed again,

    own tokens dS = p_j (do.v_j - D);   landmarks dS = p_b (do.o_b - D);   past tokens dS = p_b r_bj (do.v_j - do.o_b)

dQ goes over keys as the forward pass does. dK and dV are one kernel that is launched twice: for tokens as what their
own block sees, in tiles of the row, and for past blocks. Two warpgroups have 64 keys each, and the queries that see any
of them pass by, of all the heads that share the keys.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.landmark_attention.mosaic_gpu_tiles import (
    AROUND,
    KEY_REGISTERS,
    STAGES,
    WORKERS,
    Sizes,
    along_keys,
    copy_blocks,
    fetch_keys,
    fill,
    own_slopes,
    past_slopes,
    ring,
    scores_of,
    tiles_of,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu_where import Where
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    ROWS,
    accumulate,
    launch,
    matrix,
    send,
    unknown_zero,
    vector,
    zeros,
)

STAGES_BACK = 3
"""Tiles of queries that are on their way."""
QUERY_REGISTERS = 24, 240
"""Where queries pass by; the sums for keys and values alone are 128."""


def gradients(
    sizes: Sizes,
    q: Float[Array, "B P H K"],
    k: Float[Array, "B P G K"],
    v: Float[Array, "B P G V"],
    where: Where,
    out: Float[Array, "B P H V"],
    lse: Float[Array, "B H P"],
    grad: Float[Array, "B P H V"],
) -> tuple[Array, Array, Array]:
    """Of q, k and v, from that of the output."""
    delta = jnp.einsum("bthv,bthv->bht", out, grad, preferred_element_type=jnp.float32)
    sums = jnp.stack([lse, delta], axis=2)
    dq = _query_gradient(sizes, q, k, v, where, sums, grad)
    blocks = _Keys("landmark_dkv_past", where.past, where.starts, where.queries_of_tiles)
    of_tokens = _key_gradients(sizes._replace(slots=CHUNK), q, k, v, grad, sums, _tokens(where), own_slopes)
    of_blocks = _key_gradients(sizes, q, k, v, grad, sums, blocks, functools.partial(past_slopes, sizes=sizes))

    def both(of_tokens: Array, of_blocks: Array) -> Array:
        """A token's gradient, and that which it has in a past block."""
        count = of_blocks.shape[1]
        at, held = jnp.minimum(where.slot, count - 1)[..., None, None], (where.slot < count)[..., None, None]
        return of_tokens + jnp.where(held, jnp.take_along_axis(of_blocks, at, axis=1), jnp.zeros((), of_blocks.dtype))

    dk, dv = (both(x, y) for x, y in zip(of_tokens, of_blocks, strict=True))
    return dq, dk, dv


def _query_gradient(sizes, q, k, v, where, sums, grad):
    (b, t, h, width), values, interpret = q.shape, v.shape[3], sizes.interpret

    def query_gradient(q, k, v, grad, sums, own, past, starts, ranges, dq):
        row, head, pair, worker = (lax.axis_index(name) for name in ("row", "head", "pair", "worker"))
        group = lax.div(head, jnp.int32(sizes.share))
        first = ranges[row, pair, 0]
        count = ranges[row, pair, 1] - first

        def scoped(queries, slopes, keys, arrived):
            @pl.when(worker == WORKERS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[0], action="decrease")
                tokens = k.at[row, :, group], v.at[row, :, group]
                fill(keys, count + AROUND, fetch_keys(keys, tokens, starts.at[row], first, pair, sizes))

            @pl.when(worker < WORKERS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[1], action="increase")
                time = pl.ds((pair * WORKERS + worker) * CHUNK, CHUNK)
                for source, target in ((q, queries), (grad, slopes)):
                    plgpu.copy_gmem_to_smem(source.at[row, time, head], target.at[worker], arrived.at[worker])
                here, before = ([vector(x.at[row, i, time], ROWS) for i in range(2)] for x in (own, past))
                lse, delta = (vector(sums.at[row, head, i, time], ROWS) for i in range(2))
                plgpu.barrier_wait(arrived.at[worker])

                def added(acc, k, v, slopes_of):
                    found, of_values = scores_of((queries.at[worker], k), (slopes.at[worker], v), interpret=interpret)
                    _, of_scores = slopes_of(found, of_values)
                    (acc,) = accumulate((acc, (of_scores.astype(k.dtype), k)), interpret=interpret)
                    return acc

                def of_own(acc, k, v, near):
                    tile = pair * WORKERS - 1 + near
                    return added(acc, k, v, lambda x, y: own_slopes(x, y, tile, here, lse, delta))

                def of_past(acc, k, v, tile):
                    return added(acc, k, v, lambda x, y: past_slopes(x, y, first + tile, before, lse, delta, sizes))

                acc = along_keys(keys, count, of_own, of_past, zeros(CHUNK, width))
                queries.at[worker][...] = acc.astype(queries.dtype)
                plgpu.commit_smem()
                send((queries.at[worker], dq.at[row, time, head]))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            matrix(WORKERS, CHUNK, width, tile=64),
            matrix(WORKERS, CHUNK, values, tile=64),
            ring(STAGES, 2 * sizes.blocks, *tiles_of(STAGES, width, values)),
            plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
            collective_axes="worker",
        )

    return launch(
        query_gradient,
        name="landmark_dq",
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid={"row": b, "head": h, "pair": t // (WORKERS * CHUNK)},
        workers=WORKERS,
        interpret=interpret,
    )(q, k, v, grad, sums, where.own, where.past, where.starts, where.tiles_of_queries)


class _Keys(NamedTuple):
    """Keys that queries pass by."""

    name: str
    """Of the kernel."""
    reach: Int[Array, "B 2 P"]
    """What queries see of them."""
    starts: Int[Array, "B M"]
    """Of the blocks of a tile."""
    ranges: Int[Array, "B L 2"]
    """The tiles of queries that see two tiles."""


def _tokens(where: Where) -> _Keys:
    """The row itself, as blocks of a tile each."""
    rows, _, length = where.own.shape
    tiles = jnp.arange(length // CHUNK)
    pairs = tiles[::WORKERS]
    ranges = jnp.stack([pairs, jnp.minimum(pairs + AROUND, tiles.size)], axis=1)
    starts, ranges = (jnp.broadcast_to(x.astype(jnp.int32), (rows, *x.shape)) for x in (tiles * CHUNK, ranges))
    return _Keys("landmark_dkv_own", where.own, starts, ranges)


def _key_gradients(sizes, q, k, v, grad, sums, keys: _Keys, slopes_of: Callable):
    """Of keys and values, slot by slot; slopes_of(scores, do.v, tile, reach, lse, delta) -> weights, slopes."""
    (b, _, g, width), values, interpret, share = k.shape, v.shape[3], sizes.interpret, sizes.share
    slots = keys.starts.shape[1] * sizes.slots

    def key_gradients(q, k, v, grad, sums, reach, starts, ranges, dk, dv):
        row, group, pair, worker = (lax.axis_index(name) for name in ("row", "group", "pair", "worker"))
        first = ranges[row, pair, 0]
        count = ranges[row, pair, 1] - first
        steps = count * share

        def scoped(own, kept, queries, arrived):
            @pl.when(worker == WORKERS)
            def _():
                plgpu.set_max_registers(QUERY_REGISTERS[0], action="decrease")

                def fetch(step, slot):
                    head, tile = group * share + lax.div(step, count), first + lax.rem(step, count)
                    time = pl.ds(tile * CHUNK, CHUNK)
                    sources = q.at[row, time, head], grad.at[row, time, head], reach.at[row, :, time]
                    for source, target in zip((*sources, sums.at[row, head, :, time]), queries.tiles, strict=True):
                        plgpu.copy_gmem_to_smem(source, target.at[slot], queries.filled.at[slot])

                fill(queries, steps, fetch)

            @pl.when(worker < WORKERS)
            def _():
                plgpu.set_max_registers(QUERY_REGISTERS[1], action="increase")
                tile, mine = pair * WORKERS + worker, [x.at[worker] for x in own]
                tokens = k.at[row, :, group], v.at[row, :, group]
                copy_blocks(arrived.at[worker], tokens, mine, starts.at[row], tile, sizes)
                plgpu.barrier_wait(arrived.at[worker])

                def turn(step, carry):
                    slot, zero = queries.slot(step), unknown_zero(step)
                    anew = worker + zero
                    plgpu.barrier_wait(queries.filled.at[slot])
                    q, grad, reach, sums = (x.at[slot] for x in queries.tiles)
                    pairs = zip((q, grad), (x.at[anew] for x in own), strict=True)
                    found, of_values = scores_of(*pairs, interpret=interpret)
                    seen, (lse, delta) = ([plgpu.load(x.at[i], layout=ROWS) for i in range(2)] for x in (reach, sums))
                    for i, x in enumerate(slopes_of(found, of_values, tile + zero, seen, lse, delta)):
                        kept.at[anew, i][...] = x.astype(kept.dtype)
                    plgpu.commit_smem()
                    weights, slopes = (kept.at[anew, i].transpose((1, 0)) for i in range(2))
                    dk, dv = carry
                    carry = accumulate((dk, (slopes, q)), (dv, (weights, grad)), interpret=interpret)
                    plgpu.commit_smem()  # all warps have read
                    plgpu.barrier_arrive(queries.freed.at[slot])
                    return tuple(carry)

                found = lax.fori_loop(0, steps, turn, (zeros(CHUNK, width), zeros(CHUNK, values)))
                for room, x in zip(mine, found, strict=True):
                    room[...] = x.astype(room.dtype)
                plgpu.commit_smem()
                targets = [x.at[row, pl.ds(tile * CHUNK, CHUNK), group] for x in (dk, dv)]
                send(*zip(mine, targets, strict=True))
                plgpu.wait_smem_to_gmem(0)

        vectors = plgpu.SMEM((STAGES_BACK, 2, CHUNK), jnp.int32), plgpu.SMEM((STAGES_BACK, 2, CHUNK), jnp.float32)
        pl.run_scoped(
            scoped,
            tiles_of(WORKERS, width, values),
            matrix(WORKERS, 2, CHUNK, CHUNK, tile=64),
            ring(STAGES_BACK, 4, *tiles_of(STAGES_BACK, width, values), *vectors),
            plgpu.Barrier(num_arrivals=2 * sizes.blocks, num_barriers=WORKERS),
            collective_axes="worker",
        )

    return launch(
        key_gradients,
        name=keys.name,
        out=tuple(jax.ShapeDtypeStruct((b, slots, g, w), x.dtype) for w, x in ((width, k), (values, v))),
        grid={"row": b, "group": g, "pair": keys.ranges.shape[1]},
        workers=WORKERS,
        interpret=interpret,
    )(q, k, v, grad, sums, keys.reach, keys.starts, keys.ranges)
