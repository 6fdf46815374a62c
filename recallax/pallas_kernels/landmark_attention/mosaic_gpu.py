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

from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.landmark_attention.blocks import LandmarkCache
from recallax.pallas_kernels.landmark_attention.mosaic_gpu_gradients import gradients
from recallax.pallas_kernels.landmark_attention.mosaic_gpu_tiles import (
    AROUND,
    KEY_REGISTERS,
    SHAPE,
    STAGES,
    WORKERS,
    Layout,
    Sizes,
    along_keys,
    fetch_keys,
    fill,
    grouped,
    own_scores,
    ring,
    scores_of,
    seen_blocks,
    tiles_of,
)
from recallax.pallas_kernels.landmark_attention.mosaic_gpu_where import Where, where
from recallax.pallas_kernels.landmark_attention.xla import NEVER
from recallax.pallas_kernels.mosaic_gpu import CHUNK, ROWS, accumulate, along_rows, launch, matrix, send, vector, zeros

WIDTHS = (64, 128)
"""Of keys and of values."""
SLOTS = (16, 32, 64)
"""Of a block: its tokens and the landmark fill the smallest that holds them."""


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segments: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    real: int,
    past: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """The op's form for Hopper: whole rows, bfloat16, K and V of 64 or 128, blocks of at most 63 tokens.

    q is scaled already. A document's tokens follow each other without padding.
    """
    interpret = interpreting("gpu")
    if past is not None:
        raise Unsupported("blocks from before the row are given; the kernel takes whole rows only")
    if real >= SLOTS[-1]:
        raise Unsupported(f"a block has {real} tokens; with its landmark it must fit in a tile of {SLOTS[-1]} keys")
    for name, size in (("K", q.shape[3]), ("V", v.shape[3])):
        if size not in WIDTHS:
            raise Unsupported(f"{name} is {size}; it must be one of {WIDTHS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    length = q.shape[1]
    slots = next(n for n in SLOTS if n > real)
    sizes = Sizes(real, slots, q.shape[2] // k.shape[2], interpret)
    # Slots behind the last landmark may lie behind the row.
    extra = -(length + slots - real - 1) % (WORKERS * CHUNK) + slots - real - 1
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
    return _attend(sizes, q, k, v, where(segments, positions, sizes, length + extra))[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes: Sizes, q: Array, k: Array, v: Array, places: Where) -> Float[Array, "B P H V"]:
    return _forward(sizes, q, k, v, places)[0]


def _attend_fwd(sizes, q, k, v, places):
    out, lse = _forward(sizes, q, k, v, places)
    return out, (q, k, v, places, out, lse)


def _attend_bwd(sizes, kept, grad):
    q, k, v, places, out, lse = kept
    return *gradients(sizes, q, k, v, places, out, lse, grad), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(sizes, q, k, v, places):
    """The output, and the log2 of the sums of exponentials [B, H, P], 0 where nothing is seen."""
    (b, t, h, width), values, interpret = q.shape, v.shape[3], sizes.interpret

    def forward(q, k, v, own, past, starts, ranges, out, lse):
        row, head, pair, worker = (lax.axis_index(name) for name in ("row", "head", "pair", "worker"))
        group = lax.div(head, jnp.int32(sizes.share))
        first = ranges[row, pair, 0]
        count = ranges[row, pair, 1] - first

        def scoped(queries, staged, keys, arrived):
            @pl.when(worker == WORKERS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[0], action="decrease")
                tokens = k.at[row, :, group], v.at[row, :, group]
                fill(keys, count + AROUND, fetch_keys(keys, tokens, starts.at[row], first, pair, sizes))

            @pl.when(worker < WORKERS)
            def _():
                plgpu.set_max_registers(KEY_REGISTERS[1], action="increase")
                time, mine = pl.ds((pair * WORKERS + worker) * CHUNK, CHUNK), queries.at[worker]
                plgpu.copy_gmem_to_smem(q.at[row, time, head], mine, arrived.at[worker])
                here, before = ([vector(x.at[row, i, time], ROWS) for i in range(2)] for x in (own, past))
                plgpu.barrier_wait(arrived.at[worker])

                def of_own(carry, k, v, near):
                    (found,) = scores_of((mine, k), interpret=interpret)
                    found, seen = own_scores(found, pair * WORKERS - 1 + near, here)
                    found = jnp.where(seen, found, NEVER)
                    highest = jnp.maximum(carry[0], jnp.max(found, axis=1))
                    weights = jnp.where(seen, jnp.exp2(found - along_rows(highest, SHAPE)), 0.0)
                    return _added(carry, highest, jnp.sum(weights, axis=1), weights, v, interpret)

                def of_past(carry, k, v, tile):
                    layout = Layout(sizes)
                    (found,) = scores_of((mine, k), interpret=interpret)
                    part = grouped(found, layout)
                    visible = seen_blocks(first + tile, before, sizes)
                    highest = carry[0]
                    for seen, logit in zip(visible, part.logits, strict=True):
                        highest = jnp.maximum(highest, jnp.where(seen, logit, NEVER))
                    chosen = [
                        jnp.where(seen, jnp.exp2(logit - highest), 0.0)
                        for seen, logit in zip(visible, part.logits, strict=True)
                    ]
                    shares = [p / total for p, total in zip(chosen, part.totals, strict=True)]
                    weights = part.exponentials * layout.spread(shares)
                    return _added(carry, highest, functools.reduce(jnp.add, chosen), weights, v, interpret)

                start = (plgpu.layout_cast(jnp.full((CHUNK,), x, jnp.float32), ROWS) for x in (NEVER, 0.0))
                highest, total, acc = along_keys(keys, count, of_own, of_past, (*start, zeros(CHUNK, values)))
                some = total > 0
                share = jnp.where(some, total, 1.0)
                lse[row, head, time] = jnp.where(some, highest + jnp.log2(share), 0.0)
                staged.at[worker][...] = (acc / along_rows(share, acc.shape)).astype(staged.dtype)
                plgpu.commit_smem()
                send((staged.at[worker], out.at[row, time, head]))
                plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            matrix(WORKERS, CHUNK, width, tile=64),
            matrix(WORKERS, CHUNK, values, tile=64),
            ring(STAGES, 2 * sizes.blocks, *tiles_of(STAGES, width, values)),
            plgpu.Barrier(num_arrivals=1, num_barriers=WORKERS),
            collective_axes="worker",
        )

    return launch(
        forward,
        name="landmark_forward",
        out=(jax.ShapeDtypeStruct((b, t, h, values), v.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)),
        grid={"row": b, "head": h, "pair": t // (WORKERS * CHUNK)},
        workers=WORKERS,
        interpret=interpret,
    )(q, k, v, places.own, places.past, places.starts, places.tiles_of_queries)


def _added(carry, highest, chosen, weights, values, interpret):
    """The running maximum, sum and weighted values with those of a tile."""
    most, total, acc = carry
    shrink = jnp.exp2(most - highest)
    acc = acc * along_rows(shrink, acc.shape)
    (acc,) = accumulate((acc, (weights.astype(values.dtype), values)), interpret=interpret)
    return highest, total * shrink + chosen, acc
