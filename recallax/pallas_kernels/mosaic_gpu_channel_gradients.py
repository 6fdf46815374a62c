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

from recallax.pallas_kernels.linear_attention.gates import LOG2E, Gates
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    MATRIX,
    accumulate,
    digits,
    launch,
    load,
    matrix,
    rows_and_columns,
    send,
    vector,
    zeros,
)
from recallax.pallas_kernels.mosaic_gpu_channels import (
    LEVELS,
    SQUARE,
    between_documents,
    documents_in,
    meeting_factors,
    meets,
    outside,
    summed_digits,
    sums_of,
)

PART = 32
"""Channels of a block."""


def channel_gradients(
    q: Float[Array, "B T Q K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    values: tuple[Float[Array, "B T H V"], Float[Array, "B T H V"]],
    states: tuple[Float[Array, "B H N K V"], ...],
    stays: Float[Array, "B H N K"],
    docs: Gates | None,
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
        time, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(part * PART, PART)
        # A matrix in registers has 64 rows at least, so states come for two parts.
        pair_of_parts, own = pl.ds(lax.div(part, 2) * 2 * PART, 2 * PART), pl.ds(lax.rem(part, 2) * PART, PART)

        def scoped(tokens, wide, held, sums, meeting, pairs, vectors, arrived):
            for i, x in enumerate((q, k)):
                group = lax.div(head, jnp.int32(h // x.shape[2]))
                plgpu.copy_gmem_to_smem(x.at[row, time, group, channels], tokens.at[i], arrived)
            for i, x in enumerate(values):
                plgpu.copy_gmem_to_smem(x.at[row, time, head], wide.at[i], arrived)
            for i, x in enumerate(states):
                plgpu.copy_gmem_to_smem(x.at[row, head, n, pair_of_parts], held.at[i], arrived)
            gates = documents_in(docs, row, time, vectors, arrived)
            plgpu.barrier_wait(arrived)

            if behind:

                @pl.when(lax.rem(part, 2) == 0)
                def _():
                    behind[0][row, head, n, pair_of_parts] = jnp.sum(load(held.at[0]) * load(held.at[1]), axis=1)

            (slopes,) = accumulate((zeros(*SQUARE), (wide.at[0], wide.at[1].transpose((1, 0)))), interpret=interpret)
            slopes = between_documents(slopes, gates) * scale
            against, rooms = [held.at[i, own] for i in range(len(states))], (tokens, sums, meeting, pairs)
            log2 = vector(decay.at[row, time, head, channels], MATRIX)
            *both, own_slope = _of_channels(rooms, log2, wide, against, slopes, gates, scale, interpret)
            slope[row, time, head, channels] = own_slope
            for i, x in enumerate(both):
                tokens.at[i][...] = x.astype(tokens.dtype)
            plgpu.commit_smem()
            send(*((tokens.at[i], x.at[row, time, head, channels]) for i, x in enumerate((dq, dk))))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            matrix(2, CHUNK, PART, tile=PART),
            matrix(2, CHUNK, columns, tile=64),
            matrix(len(states), 2 * PART, columns, tile=64),
            matrix(4, CHUNK, PART, tile=PART),
            matrix(2, CHUNK, PART, tile=PART),
            matrix(*SQUARE, tile=PART),
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=4 + len(states) + len(docs)),
        )

    wide = jax.ShapeDtypeStruct((b, t, h, width), q.dtype)
    exact = jax.ShapeDtypeStruct(wide.shape, jnp.float32)
    dq, dk, slope, behind = launch(
        gradients,
        name="gradients" if len(states) > 1 else "erasing_gradients",
        out=(wide, wide, exact, (jax.ShapeDtypeStruct(stays.shape, jnp.float32),) * (len(states) - 1)),
        grid={"row": b, "head": h, "part": width // PART, "chunk": t // CHUNK},
        workers=1,
        copiers=0,
        interpret=interpret,
    )(q, k, decay, values, states, docs or ())
    for x in behind:
        slope += jnp.repeat(jnp.moveaxis(x * stays, 2, 1), CHUNK, axis=1)
    return dq, dk, slope / LOG2E


def _of_channels(rooms, log2, wide, against, slopes, gates, scale, interpret):
    """The gradients of some channels of q and k, and of their decays but for what the state passes on."""
    (tokens, sums, meeting, pairs), shape = rooms, (CHUNK, PART)
    q, k = tokens.at[0], tokens.at[1]
    summed_digits(log2, sums, interpret)
    plgpu.commit_smem()
    read, kept = outside(sums, gates, shape, 0, interpret)
    read *= scale
    dq, *dk = accumulate(
        *((zeros(*shape), (wide.at[i], x.transpose((1, 0)))) for i, x in enumerate(against)), interpret=interpret
    )
    plgpu.commit_smem()  # all warps have read
    slopes_room = wide.at[0, :, pl.ds(0, CHUNK)]
    i, t = rows_and_columns(SQUARE)
    slopes_room[...] = (slopes if len(against) > 1 else jnp.where(i > t, slopes, 0.0)).astype(wide.dtype)
    early = load(q) * read * dq
    late = load(k) * kept * dk[0] if dk else None
    dq, dk = dq * read, dk[0] * kept if dk else zeros(*shape)

    def meet(step, gradients):
        dq, dk, early = gradients
        of_queries, of_keys = meeting_factors(step, sums, shape, interpret)
        meeting.at[0][...] = (load(q) * of_queries).astype(meeting.dtype)
        meeting.at[1][...] = (load(k) * of_keys).astype(meeting.dtype)
        chosen = jnp.where(meets(step), load(slopes_room), 0.0).astype(pairs.dtype)
        pairs[...] = chosen
        plgpu.commit_smem()
        to_queries, to_keys = accumulate(
            (zeros(*shape), (chosen, meeting.at[1])),
            (zeros(*shape), (pairs.transpose((1, 0)), meeting.at[0])),
            interpret=interpret,
        )
        early += load(meeting.at[0]) * to_queries - load(meeting.at[1]) * to_keys
        plgpu.commit_smem()  # all warps have read
        return dq + to_queries * of_queries, dk + to_keys * of_keys, early

    dq, dk, early = lax.fori_loop(0, LEVELS, meet, (dq, dk, early))
    for n, part in enumerate((*digits(early, interpret), *(() if late is None else digits(late, interpret)))):
        sums.at[n][...] = part
    plgpu.commit_smem()
    slope = sums_of(t >= i, (sums.at[0], sums.at[1]), shape, interpret)
    if late is not None:
        slope += sums_of(t < i, (sums.at[2], sums.at[3]), shape, interpret)
    plgpu.commit_smem()  # all warps have read
    return dq, dk, slope
