"""Backward pass of landmark attention: one pass for queries, one for keys and values.

With D = do.o, o_b = sum_j r_bj v_j, p from the saved logarithm of the sum and r recomputed,

    own tokens dS = p_j (do.v_j - D);   landmarks dS = p_b (do.o_b - D);   past tokens dS = p_b r_bj (do.v_j - do.o_b)

dQ iterates over keys as the forward pass does. dK and dV are one kernel that is launched twice: for tokens in their own
block, in tiles of the row, and for past blocks. Two warpgroups own 64 keys each, and iterate over the queries that see
any of them, of all heads that share the keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    QueryPass,
    TileRing,
    consume_key_tiles,
    copy_block_tile,
    load_pair,
    make_tile_ring,
    own_block_score_grads,
    past_block_score_grads,
    produce_key_tiles,
    produce_tiles,
    smem_tiles,
    tile_scores,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_visibility import Visibility
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA_ROW,
    copy_smem_to_gmem,
    opaque_zero,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

NUM_QUERY_STAGES = 3
"""Tiles of queries in shared memory at once: the loaded one and those that are being loaded."""
QUERY_REGISTERS = 24, 240
"""Registers per thread of the producer and of the consumers where tiles of queries are loaded; the accumulators of keys
and values alone take 128."""


class _QueryTiles(NamedTuple):
    """Arrays that pass by the keys, tile by tile; in the kernel, references to them."""

    q: Float[Array, "B P H K"]
    k: Float[Array, "B P G K"]
    v: Float[Array, "B P G V"]
    out_grad: Float[Array, "B P H V"]
    sums: Float[Array, "B H 2 P"]
    """The log2 of the sums of exponentials, and D."""


class _KeyTiles(NamedTuple):
    """The keys whose gradients a launch computes."""

    kernel_name: str
    bounds: Int[Array, "B 2 P"]
    """Bounds of the keys that each query sees."""
    block_starts: Int[Array, "B M"]
    """Start of each block of a tile."""
    query_tile_ranges: Int[Array, "B L 2"]
    """Tiles of queries that see any of two tiles."""


def landmark_attention_bwd(config: LandmarkKernelConfig, residuals, out_grad):
    """Return the gradients of q, k and v, from that of the output."""
    q, k, v, visibility, out, lse = residuals
    delta = jnp.einsum("bthv,bthv->bht", out, out_grad, preferred_element_type=jnp.float32)
    inputs = _QueryTiles(q, k, v, out_grad, jnp.stack([lse, delta], axis=2))
    dq = _launch_query_grad(config, inputs, visibility)
    past_blocks = _KeyTiles(
        "landmark_dkv_past", visibility.past_bounds, visibility.block_starts, visibility.query_tile_ranges
    )
    own_config = config._replace(padded_block_size=CHUNK)
    own_grads = _launch_key_value_grads(own_config, inputs, _row_key_tiles(visibility), own_block_score_grads)
    past_score_grads = functools.partial(past_block_score_grads, config=config)
    past_grads = _launch_key_value_grads(config, inputs, past_blocks, past_score_grads)

    def add_past(own: Array, past: Array) -> Array:
        """Add to each token's gradient the one that it has in a past block."""
        num_slots = past.shape[1]
        index, has_slot = (
            jnp.minimum(visibility.token_slot, num_slots - 1)[..., None, None],
            (visibility.token_slot < num_slots)[..., None, None],
        )
        return own + jnp.where(has_slot, jnp.take_along_axis(past, index, axis=1), jnp.zeros((), past.dtype))

    dk, dv = (add_past(own, past) for own, past in zip(own_grads, past_grads, strict=True))
    return dq, dk, dv, None


def _row_key_tiles(visibility: Visibility) -> _KeyTiles:
    """Return the tokens of the row, as blocks of one tile each."""
    rows, _, length = visibility.own_bounds.shape
    tiles = jnp.arange(length // CHUNK)
    pairs = tiles[::NUM_CONSUMER_WGS]
    ranges = jnp.stack([pairs, jnp.minimum(pairs + NUM_OWN_TILES, tiles.size)], axis=1)
    starts, ranges = (jnp.broadcast_to(x.astype(jnp.int32), (rows, *x.shape)) for x in (tiles * CHUNK, ranges))
    return _KeyTiles("landmark_dkv_own", visibility.own_bounds, starts, ranges)


def _launch_query_grad(config: LandmarkKernelConfig, inputs: _QueryTiles, visibility: Visibility):
    """Return the gradient of the queries."""
    (b, t, h, k_dim), v_dim = inputs.q.shape, inputs.v.shape[3]

    def query_gradient(inputs, own_bounds, past_bounds, block_starts, key_tile_ranges, dq):
        query_pass = QueryPass.current(key_tile_ranges, config)
        row, head, warpgroup = query_pass.row, query_pass.head, query_pass.warpgroup

        def scoped(queries, out_grads, keys, loaded):
            @pl.when(warpgroup == NUM_CONSUMER_WGS)
            def _():
                produce_key_tiles(keys, inputs.k, inputs.v, block_starts, query_pass, config)

            @pl.when(warpgroup < NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[1], action="increase")
                time = query_pass.time()
                for source, target in ((inputs.q, queries), (inputs.out_grad, out_grads)):
                    plgpu.copy_gmem_to_smem(source.at[row, time, head], target.at[warpgroup], loaded.at[warpgroup])
                own, past = (load_pair(x.at[row], time) for x in (own_bounds, past_bounds))
                lse, delta = load_pair(inputs.sums.at[row, head], time)
                plgpu.barrier_wait(loaded.at[warpgroup])

                def add_tile(acc, k, v, score_grads_fn):
                    tiles = (queries.at[warpgroup], k), (out_grads.at[warpgroup], v)
                    _, score_grads = score_grads_fn(*tile_scores(*tiles))
                    return wgmma_accumulate((acc, (score_grads.astype(k.dtype), k)))[0]

                def add_own_tile(acc, k, v, offset):
                    tile = query_pass.own_tile(offset)
                    return add_tile(acc, k, v, lambda x, y: own_block_score_grads(x, y, tile, own, lse, delta))

                def add_past_tile(acc, k, v, tile):
                    tile = query_pass.first_past_tile + tile
                    return add_tile(
                        acc, k, v, lambda x, y: past_block_score_grads(x, y, tile, past, lse, delta, config)
                    )

                acc = zero_accumulator(CHUNK, k_dim)
                acc = consume_key_tiles(keys, query_pass.num_past_tiles, add_own_tile, add_past_tile, acc)
                queries.at[warpgroup][...] = acc.astype(queries.dtype)
                plgpu.commit_smem()
                copy_smem_to_gmem((queries.at[warpgroup], dq.at[row, time, head]))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            *(smem_matrix(NUM_CONSUMER_WGS, CHUNK, dim, tile=64) for dim in (k_dim, v_dim)),
            make_tile_ring(NUM_KEY_STAGES, 2 * config.blocks_per_tile, *smem_tiles(NUM_KEY_STAGES, k_dim, v_dim)),
            plgpu.Barrier(num_arrivals=2, num_barriers=NUM_CONSUMER_WGS),
            collective_axes="warpgroup",
        )

    return launch_kernel(
        query_gradient,
        name="landmark_dq",
        out_type=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        grid={"row": b, "head": h, "pair": t // (NUM_CONSUMER_WGS * CHUNK)},
        num_consumer_wgs=NUM_CONSUMER_WGS,
    )(inputs, *visibility[:4])


class _KeyPass(NamedTuple):
    """Position of a block that owns a pair of tiles of keys."""

    row: Any
    group: Any
    pair: Any
    warpgroup: Any
    first_query_tile: Any
    num_query_tiles: Any
    num_steps: Any
    """Tiles of queries of all heads of the group."""

    @classmethod
    def current(cls, query_tile_ranges, heads_per_group: int) -> "_KeyPass":
        """Return the position of this block."""
        row, group, pair, warpgroup = (lax.axis_index(name) for name in ("row", "group", "pair", "warpgroup"))
        first = query_tile_ranges[row, pair, 0]
        count = query_tile_ranges[row, pair, 1] - first
        return cls(row, group, pair, warpgroup, first, count, count * heads_per_group)


def _launch_key_value_grads(
    config: LandmarkKernelConfig, inputs: _QueryTiles, keys: _KeyTiles, score_grads_fn: Callable
):
    """Return the gradients of keys and values, slot by slot.

    score_grads_fn: (scores, do.v, tile, bounds, lse, delta) -> weights and gradients of the scores.
    """
    (b, _, g, k_dim), v_dim = inputs.k.shape, inputs.v.shape[3]
    num_slots = keys.block_starts.shape[1] * config.padded_block_size

    def key_gradients(inputs, bounds, block_starts, query_tile_ranges, dk, dv):
        position = _KeyPass.current(query_tile_ranges, config.heads_per_group)
        row, warpgroup = position.row, position.warpgroup

        def scoped(own_keys, pairs, queries, loaded):
            @pl.when(warpgroup == NUM_CONSUMER_WGS)
            def _():
                _produce_query_tiles(inputs, bounds, queries, position, config.heads_per_group)

            @pl.when(warpgroup < NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(QUERY_REGISTERS[1], action="increase")
                tile, mine = position.pair * NUM_CONSUMER_WGS + warpgroup, [x.at[warpgroup] for x in own_keys]
                tokens = inputs.k.at[row, :, position.group], inputs.v.at[row, :, position.group]
                copy_block_tile(loaded.at[warpgroup], tokens, mine, block_starts.at[row], tile, config)
                plgpu.barrier_wait(loaded.at[warpgroup])
                grads = _consume_query_tiles(own_keys, pairs, queries, position, tile, score_grads_fn)
                for ref, x in zip(mine, grads, strict=True):
                    ref[...] = x.astype(ref.dtype)
                plgpu.commit_smem()
                targets = [x.at[row, pl.ds(tile * CHUNK, CHUNK), position.group] for x in (dk, dv)]
                copy_smem_to_gmem(*zip(mine, targets, strict=True))
                plgpu.wait_smem_to_gmem(0)

        vectors = (plgpu.SMEM((NUM_QUERY_STAGES, 2, CHUNK), dtype) for dtype in (jnp.int32, jnp.float32))
        pl.run_scoped(
            scoped,
            smem_tiles(NUM_CONSUMER_WGS, k_dim, v_dim),
            smem_matrix(NUM_CONSUMER_WGS, 2, *CHUNK_SHAPE, tile=64),
            make_tile_ring(NUM_QUERY_STAGES, 4, *smem_tiles(NUM_QUERY_STAGES, k_dim, v_dim), *vectors),
            plgpu.Barrier(num_arrivals=2 * config.blocks_per_tile, num_barriers=NUM_CONSUMER_WGS),
            collective_axes="warpgroup",
        )

    return launch_kernel(
        key_gradients,
        name=keys.kernel_name,
        out_type=tuple(
            jax.ShapeDtypeStruct((b, num_slots, g, width), x.dtype)
            for width, x in ((k_dim, inputs.k), (v_dim, inputs.v))
        ),
        grid={"row": b, "group": g, "pair": keys.query_tile_ranges.shape[1]},
        num_consumer_wgs=NUM_CONSUMER_WGS,
    )(inputs, *keys[1:])


def _produce_query_tiles(inputs, bounds, queries: TileRing, position: _KeyPass, heads_per_group: int) -> None:
    """Load, in the producer warpgroup, the tiles of queries that see the keys of a block, head by head."""
    plgpu.set_max_registers(QUERY_REGISTERS[0], action="decrease")

    def load_tile(step, slot):
        head = position.group * heads_per_group + lax.div(step, position.num_query_tiles)
        tile = position.first_query_tile + lax.rem(step, position.num_query_tiles)
        row, time = position.row, pl.ds(tile * CHUNK, CHUNK)
        sources = inputs.q.at[row, time, head], inputs.out_grad.at[row, time, head], bounds.at[row, :, time]
        for source, target in zip((*sources, inputs.sums.at[row, head, :, time]), queries.tiles, strict=True):
            plgpu.copy_gmem_to_smem(source, target.at[slot], queries.full_barriers.at[slot])

    produce_tiles(queries, position.num_steps, load_tile)


def _consume_query_tiles(own_keys, pairs, queries: TileRing, position: _KeyPass, tile, score_grads_fn):
    """Return, in a consumer warpgroup, the gradients of its keys and values, summed over the tiles of queries."""
    k_dim, v_dim = (x.shape[-1] for x in own_keys)

    def add_tile(step, carry):
        slot, zero = queries.slot(step), opaque_zero(step)
        own = position.warpgroup + zero
        plgpu.barrier_wait(queries.full_barriers.at[slot])
        q, out_grad, bounds, sums = (x.at[slot] for x in queries.tiles)
        scores, weight_grads = tile_scores(*zip((q, out_grad), (x.at[own] for x in own_keys), strict=True))
        bounds, (lse, delta) = ([plgpu.load(x.at[i], layout=WGMMA_ROW) for i in range(2)] for x in (bounds, sums))
        for i, x in enumerate(score_grads_fn(scores, weight_grads, tile + zero, bounds, lse, delta)):
            pairs.at[own, i][...] = x.astype(pairs.dtype)
        plgpu.commit_smem()
        weights, score_grads = (pairs.at[own, i].transpose((1, 0)) for i in range(2))
        dk, dv = carry
        carry = wgmma_accumulate((dk, (score_grads, q)), (dv, (weights, out_grad)))
        plgpu.commit_smem()  # all warps have read
        plgpu.barrier_arrive(queries.empty_barriers.at[slot])
        return tuple(carry)

    zeros = zero_accumulator(CHUNK, k_dim), zero_accumulator(CHUNK, v_dim)
    return lax.fori_loop(0, position.num_steps, add_tile, zeros)
