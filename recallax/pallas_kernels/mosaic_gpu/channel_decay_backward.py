"""The gradients of queries, keys and decays per channel on Hopper, once the states and theirs are known.

Every chunk for itself, 32 channels at a time. With S the state before the chunk, dS the
gradient of that behind it, and dP = scale dO V^T below and on the diagonal,

    dQ = scale 2^L (dO S^T) + what dP gives        dK = 2^(L_C - L) (V dS^T) + what dP^T gives

where dP meets queries and keys at the borders of `mosaic_gpu_channels.py`. A decay weighs what passes from before its
token to the token and those behind, so its gradient is, channel by channel,

    sum_{i >= t} q~_i (dO_i S^T) + sum_{j < t} k~_j (V_j dS^T) + sum_{i >= t} (q_i dq_i - k_i dk_i within the chunk)

and the state's own 2^L_C S.dS. The last sum is a difference in which almost everything cancels, so both its sides are
of the same rounded operands.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.channel_decay_forward import (
    CHUNK_SHAPE,
    NUM_LEVELS,
    chunk_boundary_decay,
    copy_document_gates,
    level_decay_factors,
    level_mask,
    mask_across_documents,
    masked_row_sums,
    store_hi_lo_decay,
)
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import LOG2E, CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    copy_smem_to_gmem,
    hi_lo_split,
    launch_kernel,
    load_smem_f32,
    load_vector,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

CHANNEL_TILE = 32
"""Channels of a block."""


def channel_decay_grads(
    q: Float[Array, "B T Q K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"]],
    states: tuple[Float[Array, "B H N K V"], ...],
    chunk_decay: Float[Array, "B H N K"],
    document_gates: CumulativeDecay | None,
    scale: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """Of q and k per value head, and of the log2-decay.

    values: dO and V; states: S and dS; stays: 2^L_C. Without dS q are what erases: they do not see their own keys, and
    what the keys give to the state is left out.
    """
    (b, t, _, width), (h, columns) = q.shape, values[0].shape[2:]

    def gradients(q, k, decay, values, states, docs, dq, dk, slope, behind):
        row, head, part, n = (lax.axis_index(name) for name in ("row", "head", "part", "chunk"))
        time, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(part * CHANNEL_TILE, CHANNEL_TILE)
        # A matrix in registers has 64 rows at least, so states come for two parts.
        pair_of_parts, own = (
            pl.ds(lax.div(part, 2) * 2 * CHANNEL_TILE, 2 * CHANNEL_TILE),
            pl.ds(lax.rem(part, 2) * CHANNEL_TILE, CHANNEL_TILE),
        )

        def scoped(tokens, wide, held, sums, meeting, pairs, vectors, arrived):
            for i, x in enumerate((q, k)):
                group = lax.div(head, jnp.int32(h // x.shape[2]))
                plgpu.copy_gmem_to_smem(x.at[row, time, group, channels], tokens.at[i], arrived)
            for i, x in enumerate(values):
                plgpu.copy_gmem_to_smem(x.at[row, time, head], wide.at[i], arrived)
            for i, x in enumerate(states):
                plgpu.copy_gmem_to_smem(x.at[row, head, n, pair_of_parts], held.at[i], arrived)
            gates = copy_document_gates(docs, row, time, vectors, arrived)
            plgpu.barrier_wait(arrived)

            if behind:

                @pl.when(lax.rem(part, 2) == 0)
                def _():
                    behind[0][row, head, n, pair_of_parts] = jnp.sum(
                        load_smem_f32(held.at[0]) * load_smem_f32(held.at[1]), axis=1
                    )

            (slopes,) = wgmma_accumulate(
                (zero_accumulator(*CHUNK_SHAPE), (wide.at[0], wide.at[1].transpose((1, 0)))), interpret=interpret
            )
            slopes = mask_across_documents(slopes, gates) * scale
            against, rooms = [held.at[i, own] for i in range(len(states))], (tokens, sums, meeting, pairs)
            log2 = load_vector(decay.at[row, time, head, channels], WGMMA)
            *both, own_slope = _channel_tile_grads(rooms, log2, wide, against, slopes, gates, scale, interpret)
            slope[row, time, head, channels] = own_slope
            for i, x in enumerate(both):
                tokens.at[i][...] = x.astype(tokens.dtype)
            plgpu.commit_smem()
            copy_smem_to_gmem(*((tokens.at[i], x.at[row, time, head, channels]) for i, x in enumerate((dq, dk))))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(2, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(2, CHUNK, columns, tile=64),
            smem_matrix(len(states), 2 * CHANNEL_TILE, columns, tile=64),
            smem_matrix(4, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(2, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(*CHUNK_SHAPE, tile=CHANNEL_TILE),
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=4 + len(states) + len(docs)),
        )

    wide = jax.ShapeDtypeStruct((b, t, h, width), q.dtype)
    exact = jax.ShapeDtypeStruct(wide.shape, jnp.float32)
    dq, dk, slope, behind = launch_kernel(
        gradients,
        name="gradients" if len(states) > 1 else "erasing_gradients",
        out_type=(wide, wide, exact, (jax.ShapeDtypeStruct(chunk_decay.shape, jnp.float32),) * (len(states) - 1)),
        grid={"row": b, "head": h, "part": width // CHANNEL_TILE, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(q, k, decay, values, states, document_gates or ())
    for x in behind:
        slope += jnp.repeat(jnp.moveaxis(x * chunk_decay, 2, 1), CHUNK, axis=1)
    return dq, dk, slope / LOG2E


def _channel_tile_grads(scratch, log2_decay, value_tiles, state_tiles, score_grads, gates, scale, interpret):
    """The gradients of some channels of q and k, and of their decays but for what the state passes on."""
    (tokens, sums, meeting, pairs), shape = scratch, (CHUNK, CHANNEL_TILE)
    q, k = tokens.at[0], tokens.at[1]
    store_hi_lo_decay(log2_decay, sums, interpret)
    plgpu.commit_smem()
    read, kept = chunk_boundary_decay(sums, gates, shape, 0, interpret)
    read *= scale
    dq, *dk = wgmma_accumulate(
        *((zero_accumulator(*shape), (value_tiles.at[i], x.transpose((1, 0)))) for i, x in enumerate(state_tiles)),
        interpret=interpret,
    )
    plgpu.commit_smem()  # all warps have read
    slopes_room = value_tiles.at[0, :, pl.ds(0, CHUNK)]
    i, t = row_and_column_iota(CHUNK_SHAPE)
    slopes_room[...] = (score_grads if len(state_tiles) > 1 else jnp.where(i > t, score_grads, 0.0)).astype(
        value_tiles.dtype
    )
    early = load_smem_f32(q) * read * dq
    late = load_smem_f32(k) * kept * dk[0] if dk else None
    dq, dk = dq * read, dk[0] * kept if dk else zero_accumulator(*shape)

    def meet(step, gradients):
        dq, dk, early = gradients
        of_queries, of_keys = level_decay_factors(step, sums, shape, interpret)
        meeting.at[0][...] = (load_smem_f32(q) * of_queries).astype(meeting.dtype)
        meeting.at[1][...] = (load_smem_f32(k) * of_keys).astype(meeting.dtype)
        chosen = jnp.where(level_mask(step), load_smem_f32(slopes_room), 0.0).astype(pairs.dtype)
        pairs[...] = chosen
        plgpu.commit_smem()
        to_queries, to_keys = wgmma_accumulate(
            (zero_accumulator(*shape), (chosen, meeting.at[1])),
            (zero_accumulator(*shape), (pairs.transpose((1, 0)), meeting.at[0])),
            interpret=interpret,
        )
        early += load_smem_f32(meeting.at[0]) * to_queries - load_smem_f32(meeting.at[1]) * to_keys
        plgpu.commit_smem()  # all warps have read
        return dq + to_queries * of_queries, dk + to_keys * of_keys, early

    dq, dk, early = lax.fori_loop(0, NUM_LEVELS, meet, (dq, dk, early))
    for n, part in enumerate((*hi_lo_split(early, interpret), *(() if late is None else hi_lo_split(late, interpret)))):
        sums.at[n][...] = part
    plgpu.commit_smem()
    slope = masked_row_sums(t >= i, (sums.at[0], sums.at[1]), shape, interpret)
    if late is not None:
        slope += masked_row_sums(t < i, (sums.at[2], sums.at[3]), shape, interpret)
    plgpu.commit_smem()  # all warps have read
    return dq, dk, slope
