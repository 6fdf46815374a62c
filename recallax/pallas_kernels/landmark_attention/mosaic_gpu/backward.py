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

from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_tiles import (
    KEY_REGISTERS,
    NUM_CONSUMER_WGS,
    NUM_KEY_STAGES,
    NUM_OWN_TILES,
    LandmarkKernelConfig,
    consume_key_tiles,
    copy_block_tile,
    key_tile_loader,
    make_tile_ring,
    own_block_score_grads,
    past_block_score_grads,
    produce_tiles,
    smem_tiles,
    tile_scores,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_visibility import Visibility
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_ROW,
    copy_smem_to_gmem,
    launch_kernel,
    load_vector,
    opaque_zero,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

NUM_QUERY_STAGES = 3
"""Tiles of queries that are on their way."""
QUERY_REGISTERS = 24, 240
"""Where queries pass by; the sums for keys and values alone are 128."""


def landmark_attention_grads(
    config: LandmarkKernelConfig,
    q: Float[Array, "B P H K"],
    k: Float[Array, "B P G K"],
    v: Float[Array, "B P G V"],
    visibility: Visibility,
    out: Float[Array, "B P H V"],
    lse: Float[Array, "B H P"],
    grad: Float[Array, "B P H V"],
) -> tuple[Array, Array, Array]:
    """Of q, k and v, from that of the output."""
    delta = jnp.einsum("bthv,bthv->bht", out, grad, preferred_element_type=jnp.float32)
    sums = jnp.stack([lse, delta], axis=2)
    dq = _query_gradient(config, q, k, v, visibility, sums, grad)
    blocks = _KeyTiles(
        "landmark_dkv_past", visibility.past_bounds, visibility.block_starts, visibility.query_tile_ranges
    )
    of_tokens = _key_gradients(
        config._replace(padded_block_size=CHUNK), q, k, v, grad, sums, _row_key_tiles(visibility), own_block_score_grads
    )
    of_blocks = _key_gradients(
        config, q, k, v, grad, sums, blocks, functools.partial(past_block_score_grads, config=config)
    )

    def both(of_tokens: Array, of_blocks: Array) -> Array:
        """A token's gradient, and that which it has in a past block."""
        count = of_blocks.shape[1]
        at, held = (
            jnp.minimum(visibility.token_slot, count - 1)[..., None, None],
            (visibility.token_slot < count)[..., None, None],
        )
        return of_tokens + jnp.where(held, jnp.take_along_axis(of_blocks, at, axis=1), jnp.zeros((), of_blocks.dtype))

    dk, dv = (both(x, y) for x, y in zip(of_tokens, of_blocks, strict=True))
    return dq, dk, dv


def _query_gradient(config, q, k, v, visibility, sums, grad):
    (b, t, h, width), values, interpret = q.shape, v.shape[3], config.interpret

    def query_gradient(q, k, v, grad, sums, own, past, starts, ranges, dq):
        row, head, pair, worker = (lax.axis_index(name) for name in ("row", "head", "pair", "worker"))
        group = lax.div(head, jnp.int32(config.heads_per_group))
        first = ranges[row, pair, 0]
        count = ranges[row, pair, 1] - first

        def scoped(queries, slopes, keys, arrived):
            @pl.when(worker == NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[0], action="decrease")
                tokens = k.at[row, :, group], v.at[row, :, group]
                produce_tiles(
                    keys, count + NUM_OWN_TILES, key_tile_loader(keys, tokens, starts.at[row], first, pair, config)
                )

            @pl.when(worker < NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[1], action="increase")
                time = pl.ds((pair * NUM_CONSUMER_WGS + worker) * CHUNK, CHUNK)
                for source, target in ((q, queries), (grad, slopes)):
                    plgpu.copy_gmem_to_smem(source.at[row, time, head], target.at[worker], arrived.at[worker])
                here, before = ([load_vector(x.at[row, i, time], WGMMA_ROW) for i in range(2)] for x in (own, past))
                lse, delta = (load_vector(sums.at[row, head, i, time], WGMMA_ROW) for i in range(2))
                plgpu.barrier_wait(arrived.at[worker])

                def added(acc, k, v, slopes_of):
                    found, of_values = tile_scores((queries.at[worker], k), (slopes.at[worker], v), interpret=interpret)
                    _, of_scores = slopes_of(found, of_values)
                    (acc,) = wgmma_accumulate((acc, (of_scores.astype(k.dtype), k)), interpret=interpret)
                    return acc

                def of_own(acc, k, v, near):
                    tile = pair * NUM_CONSUMER_WGS - 1 + near
                    return added(acc, k, v, lambda x, y: own_block_score_grads(x, y, tile, here, lse, delta))

                def of_past(acc, k, v, tile):
                    return added(
                        acc, k, v, lambda x, y: past_block_score_grads(x, y, first + tile, before, lse, delta, config)
                    )

                acc = consume_key_tiles(keys, count, of_own, of_past, zero_accumulator(CHUNK, width))
                queries.at[worker][...] = acc.astype(queries.dtype)
                plgpu.commit_smem()
                copy_smem_to_gmem((queries.at[worker], dq.at[row, time, head]))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(NUM_CONSUMER_WGS, CHUNK, width, tile=64),
            smem_matrix(NUM_CONSUMER_WGS, CHUNK, values, tile=64),
            make_tile_ring(NUM_KEY_STAGES, 2 * config.blocks_per_tile, *smem_tiles(NUM_KEY_STAGES, width, values)),
            plgpu.Barrier(num_arrivals=2, num_barriers=NUM_CONSUMER_WGS),
            collective_axes="worker",
        )

    return launch_kernel(
        query_gradient,
        name="landmark_dq",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid={"row": b, "head": h, "pair": t // (NUM_CONSUMER_WGS * CHUNK)},
        num_consumer_wgs=NUM_CONSUMER_WGS,
        interpret=interpret,
    )(
        q,
        k,
        v,
        grad,
        sums,
        visibility.own_bounds,
        visibility.past_bounds,
        visibility.block_starts,
        visibility.key_tile_ranges,
    )


class _KeyTiles(NamedTuple):
    """Keys that queries pass by."""

    kernel_name: str
    """Of the kernel."""
    bounds: Int[Array, "B 2 P"]
    """What queries see of them."""
    block_starts: Int[Array, "B M"]
    """Of the blocks of a tile."""
    query_tile_ranges: Int[Array, "B L 2"]
    """The tiles of queries that see two tiles."""


def _row_key_tiles(visibility: Visibility) -> _KeyTiles:
    """The row itself, as blocks of a tile each."""
    rows, _, length = visibility.own_bounds.shape
    tiles = jnp.arange(length // CHUNK)
    pairs = tiles[::NUM_CONSUMER_WGS]
    ranges = jnp.stack([pairs, jnp.minimum(pairs + NUM_OWN_TILES, tiles.size)], axis=1)
    starts, ranges = (jnp.broadcast_to(x.astype(jnp.int32), (rows, *x.shape)) for x in (tiles * CHUNK, ranges))
    return _KeyTiles("landmark_dkv_own", visibility.own_bounds, starts, ranges)


def _key_gradients(config, q, k, v, grad, sums, keys: _KeyTiles, score_grads_fn: Callable):
    """Of keys and values, slot by slot; slopes_of(scores, do.v, tile, reach, lse, delta) -> weights, slopes."""
    (b, _, g, width), values, interpret, share = k.shape, v.shape[3], config.interpret, config.heads_per_group
    slots = keys.block_starts.shape[1] * config.padded_block_size

    def key_gradients(q, k, v, grad, sums, reach, starts, ranges, dk, dv):
        row, group, pair, worker = (lax.axis_index(name) for name in ("row", "group", "pair", "worker"))
        first = ranges[row, pair, 0]
        count = ranges[row, pair, 1] - first
        steps = count * share

        def scoped(own, kept, queries, arrived):
            @pl.when(worker == NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(QUERY_REGISTERS[0], action="decrease")

                def fetch(step, slot):
                    head, tile = group * share + lax.div(step, count), first + lax.rem(step, count)
                    time = pl.ds(tile * CHUNK, CHUNK)
                    sources = q.at[row, time, head], grad.at[row, time, head], reach.at[row, :, time]
                    for source, target in zip((*sources, sums.at[row, head, :, time]), queries.tiles, strict=True):
                        plgpu.copy_gmem_to_smem(source, target.at[slot], queries.full_barriers.at[slot])

                produce_tiles(queries, steps, fetch)

            @pl.when(worker < NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(QUERY_REGISTERS[1], action="increase")
                tile, mine = pair * NUM_CONSUMER_WGS + worker, [x.at[worker] for x in own]
                tokens = k.at[row, :, group], v.at[row, :, group]
                copy_block_tile(arrived.at[worker], tokens, mine, starts.at[row], tile, config)
                plgpu.barrier_wait(arrived.at[worker])

                def turn(step, carry):
                    slot, zero = queries.slot(step), opaque_zero(step)
                    anew = worker + zero
                    plgpu.barrier_wait(queries.full_barriers.at[slot])
                    q, grad, reach, sums = (x.at[slot] for x in queries.tiles)
                    pairs = zip((q, grad), (x.at[anew] for x in own), strict=True)
                    found, of_values = tile_scores(*pairs, interpret=interpret)
                    seen, (lse, delta) = (
                        [plgpu.load(x.at[i], layout=WGMMA_ROW) for i in range(2)] for x in (reach, sums)
                    )
                    for i, x in enumerate(score_grads_fn(found, of_values, tile + zero, seen, lse, delta)):
                        kept.at[anew, i][...] = x.astype(kept.dtype)
                    plgpu.commit_smem()
                    weights, slopes = (kept.at[anew, i].transpose((1, 0)) for i in range(2))
                    dk, dv = carry
                    carry = wgmma_accumulate((dk, (slopes, q)), (dv, (weights, grad)), interpret=interpret)
                    plgpu.commit_smem()  # all warps have read
                    plgpu.barrier_arrive(queries.empty_barriers.at[slot])
                    return tuple(carry)

                found = lax.fori_loop(0, steps, turn, (zero_accumulator(CHUNK, width), zero_accumulator(CHUNK, values)))
                for room, x in zip(mine, found, strict=True):
                    room[...] = x.astype(room.dtype)
                plgpu.commit_smem()
                targets = [x.at[row, pl.ds(tile * CHUNK, CHUNK), group] for x in (dk, dv)]
                copy_smem_to_gmem(*zip(mine, targets, strict=True))
                plgpu.wait_smem_to_gmem(0)

        vectors = (
            plgpu.SMEM((NUM_QUERY_STAGES, 2, CHUNK), jnp.int32),
            plgpu.SMEM((NUM_QUERY_STAGES, 2, CHUNK), jnp.float32),
        )
        pl.run_scoped(
            scoped,
            smem_tiles(NUM_CONSUMER_WGS, width, values),
            smem_matrix(NUM_CONSUMER_WGS, 2, CHUNK, CHUNK, tile=64),
            make_tile_ring(NUM_QUERY_STAGES, 4, *smem_tiles(NUM_QUERY_STAGES, width, values), *vectors),
            plgpu.Barrier(num_arrivals=2 * config.blocks_per_tile, num_barriers=NUM_CONSUMER_WGS),
            collective_axes="worker",
        )

    return launch_kernel(
        key_gradients,
        name=keys.kernel_name,
        out_type=tuple(jax.ShapeDtypeStruct((b, slots, g, w), x.dtype) for w, x in ((width, k), (values, v))),
        grid={"row": b, "group": g, "pair": keys.query_tile_ranges.shape[1]},
        num_consumer_wgs=NUM_CONSUMER_WGS,
        interpret=interpret,
    )(q, k, v, grad, sums, keys.bounds, keys.block_starts, keys.query_tile_ranges)
