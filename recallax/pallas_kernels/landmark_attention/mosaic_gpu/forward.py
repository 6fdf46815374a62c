"""Forward pass of landmark attention: a running softmax over the tiles of own tokens and of past blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_tiles import (
    KEY_REGISTERS,
    NUM_CONSUMER_WGS,
    NUM_KEY_STAGES,
    TILE_SHAPE,
    BlockColumns,
    LandmarkKernelConfig,
    QueryPass,
    block_softmax,
    consume_key_tiles,
    load_pair,
    make_tile_ring,
    own_block_scores,
    produce_key_tiles,
    smem_tiles,
    tile_scores,
    visible_block_masks,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_visibility import Visibility
from recallax.pallas_kernels.landmark_attention.xla import MASKED_LOGIT
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_ROW,
    broadcast_per_row,
    copy_smem_to_gmem,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)


def landmark_attention_primal(
    config: LandmarkKernelConfig, q: Array, k: Array, v: Array, visibility: Visibility
) -> Float[Array, "B P H V"]:
    """Return the output."""
    return _launch_forward(config, q, k, v, visibility)[0]


def landmark_attention_fwd(config: LandmarkKernelConfig, q: Array, k: Array, v: Array, visibility: Visibility):
    """Return the output and the residuals."""
    out, lse = _launch_forward(config, q, k, v, visibility)
    return out, (q, k, v, visibility, out, lse)


def _launch_forward(config: LandmarkKernelConfig, q, k, v, visibility: Visibility):
    """Return the output, and the log2 of the sums of exponentials [B, H, P], 0 where nothing is visible."""
    (b, t, h, k_dim), v_dim = q.shape, v.shape[3]

    def forward(q, k, v, own_bounds, past_bounds, block_starts, key_tile_ranges, out, lse):
        query_pass = QueryPass.current(key_tile_ranges, config)
        row, head, warpgroup = query_pass.row, query_pass.head, query_pass.warpgroup

        def scoped(queries, out_smem, keys, loaded):
            @pl.when(warpgroup == NUM_CONSUMER_WGS)
            def _():
                produce_key_tiles(keys, k, v, block_starts, query_pass, config)

            @pl.when(warpgroup < NUM_CONSUMER_WGS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[1], action="increase")
                time, own_queries = query_pass.time(), queries.at[warpgroup]
                plgpu.copy_gmem_to_smem(q.at[row, time, head], own_queries, loaded.at[warpgroup])
                own, past = (load_pair(x.at[row], time) for x in (own_bounds, past_bounds))
                softmax = _TileSoftmax(own_queries, own, past, query_pass, config)
                plgpu.barrier_wait(loaded.at[warpgroup])
                start = (plgpu.layout_cast(jnp.full((CHUNK,), x, jnp.float32), WGMMA_ROW) for x in (MASKED_LOGIT, 0.0))
                highest, total, acc = consume_key_tiles(
                    keys,
                    query_pass.num_past_tiles,
                    softmax.add_own_tile,
                    softmax.add_past_tile,
                    (*start, zero_accumulator(CHUNK, v_dim)),
                )
                any_visible = total > 0
                divisor = jnp.where(any_visible, total, 1.0)
                lse[row, head, time] = jnp.where(any_visible, highest + jnp.log2(divisor), 0.0)
                out_smem.at[warpgroup][...] = (acc / broadcast_per_row(divisor, acc.shape)).astype(out_smem.dtype)
                plgpu.commit_smem()
                copy_smem_to_gmem((out_smem.at[warpgroup], out.at[row, time, head]))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(NUM_CONSUMER_WGS, CHUNK, k_dim, tile=64),
            smem_matrix(NUM_CONSUMER_WGS, CHUNK, v_dim, tile=64),
            make_tile_ring(NUM_KEY_STAGES, 2 * config.blocks_per_tile, *smem_tiles(NUM_KEY_STAGES, k_dim, v_dim)),
            plgpu.Barrier(num_arrivals=1, num_barriers=NUM_CONSUMER_WGS),
            collective_axes="warpgroup",
        )

    return launch_kernel(
        forward,
        name="landmark_forward",
        out_type=(jax.ShapeDtypeStruct((b, t, h, v_dim), v.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
        grid={"row": b, "head": h, "pair": t // (NUM_CONSUMER_WGS * CHUNK)},
        num_consumer_wgs=NUM_CONSUMER_WGS,
    )(q, k, v, visibility.own_bounds, visibility.past_bounds, visibility.block_starts, visibility.key_tile_ranges)


class _TileSoftmax:
    """The running softmax of one warpgroup's queries; the carry is the maximum, the sum and the weighted values."""

    def __init__(self, queries, own_bounds, past_bounds, query_pass: QueryPass, config: LandmarkKernelConfig):
        self.queries, self.own_bounds, self.past_bounds = queries, own_bounds, past_bounds
        self.query_pass, self.config = query_pass, config

    def add_own_tile(self, carry, k, v, offset):
        """Add a tile of tokens: the tile `offset - 1` after the first of the queries' tiles."""
        (scores,) = tile_scores((self.queries, k))
        scores, visible = own_block_scores(scores, self.query_pass.own_tile(offset), self.own_bounds)
        scores = jnp.where(visible, scores, MASKED_LOGIT)
        highest = jnp.maximum(carry[0], jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - broadcast_per_row(highest, TILE_SHAPE)), 0.0)
        return _online_softmax_update(carry, highest, jnp.sum(weights, axis=1), weights, v)

    def add_past_tile(self, carry, k, v, tile):
        """Add a tile of past blocks: each block has one weight, which its inner softmax distributes."""
        columns = BlockColumns(self.config)
        (scores,) = tile_scores((self.queries, k))
        inner = block_softmax(scores, columns)
        visible = visible_block_masks(self.query_pass.first_past_tile + tile, self.past_bounds, self.config)
        highest = carry[0]
        for mask, logit in zip(visible, inner.logits, strict=True):
            highest = jnp.maximum(highest, jnp.where(mask, logit, MASKED_LOGIT))
        block_weights = [
            jnp.where(mask, jnp.exp2(logit - highest), 0.0) for mask, logit in zip(visible, inner.logits, strict=True)
        ]
        factors = [weight / total for weight, total in zip(block_weights, inner.sums, strict=True)]
        weights = inner.exponentials * columns.broadcast_blocks(factors)
        return _online_softmax_update(carry, highest, functools.reduce(jnp.add, block_weights), weights, v)


def _online_softmax_update(carry, new_max, weight_sum, weights, values):
    """Return the running maximum, sum and weighted values with those of a tile."""
    old_max, total, acc = carry
    rescale = jnp.exp2(old_max - new_max)
    acc = acc * broadcast_per_row(rescale, acc.shape)
    (acc,) = wgmma_accumulate((acc, (weights.astype(values.dtype), values)))
    return new_max, total * rescale + weight_sum, acc
