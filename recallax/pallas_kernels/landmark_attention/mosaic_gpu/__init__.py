"""Landmark attention on Hopper: one pass over the blocks with a running softmax, and a split backward pass.

Two warpgroups have 64 queries of a head each, and a third brings the keys and values that both need: first the tiles of
tokens in which their own blocks lie, then the complete blocks of the documents that they belong to, straight from the
row, wherever they begin there. A past block enters as one logit, its landmark's, whose value is the average inside the
block. `mosaic_gpu_where.py` has what queries see, `mosaic_gpu_tiles.py` what is done with a tile, and
`mosaic_gpu_gradients.py` the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.backward import landmark_attention_grads
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_tiles import (
    KEY_REGISTERS,
    NUM_CONSUMER_WGS,
    NUM_KEY_STAGES,
    NUM_OWN_TILES,
    TILE_SHAPE,
    BlockColumns,
    LandmarkKernelConfig,
    block_softmax,
    consume_key_tiles,
    key_tile_loader,
    make_tile_ring,
    own_block_scores,
    produce_tiles,
    smem_tiles,
    tile_scores,
    visible_block_masks,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu.landmark_visibility import Visibility, compute_visibility
from recallax.pallas_kernels.landmark_attention.xla import MASKED_LOGIT
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_ROW,
    broadcast_per_row,
    copy_smem_to_gmem,
    launch_kernel,
    load_vector,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

SUPPORTED_HEAD_DIMS = (64, 128)
"""Of keys and of values."""
SUPPORTED_BLOCK_SIZES = (16, 32, 64)
"""Of a block: its tokens and the landmark fill the smallest that holds them."""


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """The op's form for Hopper: whole rows, bfloat16, K and V of 64 or 128, blocks of at most 63 tokens.

    q is scaled already. A document's tokens follow each other without padding.
    """
    interpret = use_interpreter("gpu")
    if cache is not None:
        raise Unsupported("blocks from before the row are given; the kernel takes whole rows only")
    if block_size >= SUPPORTED_BLOCK_SIZES[-1]:
        raise Unsupported(
            f"a block has {block_size} tokens; with its landmark it must fit in a tile of {SUPPORTED_BLOCK_SIZES[-1]} keys"
        )
    for name, size in (("K", q.shape[3]), ("V", v.shape[3])):
        if size not in SUPPORTED_HEAD_DIMS:
            raise Unsupported(f"{name} is {size}; it must be one of {SUPPORTED_HEAD_DIMS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    length = q.shape[1]
    slots = next(n for n in SUPPORTED_BLOCK_SIZES if n > block_size)
    sizes = LandmarkKernelConfig(block_size, slots, q.shape[2] // k.shape[2], interpret)
    # Slots behind the last landmark may lie behind the row.
    extra = -(length + slots - block_size - 1) % (NUM_CONSUMER_WGS * CHUNK) + slots - block_size - 1
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
    return _landmark_attention(sizes, q, k, v, compute_visibility(segment_ids, positions, sizes, length + extra))[
        :, :length
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _landmark_attention(
    config: LandmarkKernelConfig, q: Array, k: Array, v: Array, visibility: Visibility
) -> Float[Array, "B P H V"]:
    return _forward(config, q, k, v, visibility)[0]


def _landmark_attention_fwd(config, q, k, v, visibility):
    out, lse = _forward(config, q, k, v, visibility)
    return out, (q, k, v, visibility, out, lse)


def _landmark_attention_bwd(config, residuals, grad):
    q, k, v, places, out, lse = residuals
    return *landmark_attention_grads(config, q, k, v, places, out, lse, grad), None


_landmark_attention.defvjp(_landmark_attention_fwd, _landmark_attention_bwd)


def _forward(config, q, k, v, visibility):
    """The output, and the log2 of the sums of exponentials [B, H, P], 0 where nothing is seen."""
    (b, t, h, width), values, interpret = q.shape, v.shape[3], config.interpret

    def forward(q, k, v, own, past, starts, ranges, out, lse):
        row, head, pair, worker = (lax.axis_index(name) for name in ("row", "head", "pair", "worker"))
        group = lax.div(head, jnp.int32(config.heads_per_group))
        first = ranges[row, pair, 0]
        count = ranges[row, pair, 1] - first

        def scoped(queries, staged, keys, arrived):
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
                time, mine = pl.ds((pair * NUM_CONSUMER_WGS + worker) * CHUNK, CHUNK), queries.at[worker]
                plgpu.copy_gmem_to_smem(q.at[row, time, head], mine, arrived.at[worker])
                here, before = ([load_vector(x.at[row, i, time], WGMMA_ROW) for i in range(2)] for x in (own, past))
                plgpu.barrier_wait(arrived.at[worker])

                def of_own(carry, k, v, near):
                    (found,) = tile_scores((mine, k), interpret=interpret)
                    found, seen = own_block_scores(found, pair * NUM_CONSUMER_WGS - 1 + near, here)
                    found = jnp.where(seen, found, MASKED_LOGIT)
                    highest = jnp.maximum(carry[0], jnp.max(found, axis=1))
                    weights = jnp.where(seen, jnp.exp2(found - broadcast_per_row(highest, TILE_SHAPE)), 0.0)
                    return _online_softmax_update(carry, highest, jnp.sum(weights, axis=1), weights, v, interpret)

                def of_past(carry, k, v, tile):
                    layout = BlockColumns(config)
                    (found,) = tile_scores((mine, k), interpret=interpret)
                    part = block_softmax(found, layout)
                    visible = visible_block_masks(first + tile, before, config)
                    highest = carry[0]
                    for seen, logit in zip(visible, part.logits, strict=True):
                        highest = jnp.maximum(highest, jnp.where(seen, logit, MASKED_LOGIT))
                    chosen = [
                        jnp.where(seen, jnp.exp2(logit - highest), 0.0)
                        for seen, logit in zip(visible, part.logits, strict=True)
                    ]
                    shares = [p / total for p, total in zip(chosen, part.sums, strict=True)]
                    weights = part.exponentials * layout.broadcast_blocks(shares)
                    return _online_softmax_update(
                        carry, highest, functools.reduce(jnp.add, chosen), weights, v, interpret
                    )

                start = (plgpu.layout_cast(jnp.full((CHUNK,), x, jnp.float32), WGMMA_ROW) for x in (MASKED_LOGIT, 0.0))
                highest, total, acc = consume_key_tiles(
                    keys, count, of_own, of_past, (*start, zero_accumulator(CHUNK, values))
                )
                some = total > 0
                share = jnp.where(some, total, 1.0)
                lse[row, head, time] = jnp.where(some, highest + jnp.log2(share), 0.0)
                staged.at[worker][...] = (acc / broadcast_per_row(share, acc.shape)).astype(staged.dtype)
                plgpu.commit_smem()
                copy_smem_to_gmem((staged.at[worker], out.at[row, time, head]))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(NUM_CONSUMER_WGS, CHUNK, width, tile=64),
            smem_matrix(NUM_CONSUMER_WGS, CHUNK, values, tile=64),
            make_tile_ring(NUM_KEY_STAGES, 2 * config.blocks_per_tile, *smem_tiles(NUM_KEY_STAGES, width, values)),
            plgpu.Barrier(num_arrivals=1, num_barriers=NUM_CONSUMER_WGS),
            collective_axes="worker",
        )

    return launch_kernel(
        forward,
        name="landmark_forward",
        out_type=(jax.ShapeDtypeStruct((b, t, h, values), v.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
        grid={"row": b, "head": h, "pair": t // (NUM_CONSUMER_WGS * CHUNK)},
        num_consumer_wgs=NUM_CONSUMER_WGS,
        interpret=interpret,
    )(q, k, v, visibility.own_bounds, visibility.past_bounds, visibility.block_starts, visibility.key_tile_ranges)


def _online_softmax_update(carry, new_max, weight_sum, weights, values, interpret):
    """The running maximum, sum and weighted values with those of a tile."""
    most, total, acc = carry
    shrink = jnp.exp2(most - new_max)
    acc = acc * broadcast_per_row(shrink, acc.shape)
    (acc,) = wgmma_accumulate((acc, (weights.astype(values.dtype), values)), interpret=interpret)
    return new_max, total * shrink + weight_sum, acc
