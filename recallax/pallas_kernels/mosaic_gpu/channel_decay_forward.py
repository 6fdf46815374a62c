"""Decays per channel of the key on Hopper: what becomes of queries and keys before anything walks over time.

2^(L_i - L_j) differs from channel to channel, so it goes inside the scores, and its two factors overflow for gates
without a bound. A chunk of 64 tokens is therefore halved twice: queries of a second half meet keys of the first at the
border between them, where both have decayed. Blocks of 16 tokens meet in their middle, where half of the factors are
above 1; no decay counts as more than 2^-12 there, so these stay below 2^96. All exponents are sums of log2-decays from
the border outwards: products with matrices of ones, of decays in two bfloat16 digits. Source: secondary chunking, GLA
(Yang et al. 2023, arXiv 2312.06635), section 4.3.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import inverse_scratch, store_unit_lower_inverse
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    Ref,
    block_index,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    hi_lo_split,
    launch_kernel,
    load_smem_f32,
    load_vector,
    opaque_zero,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

CHANNEL_TILE = 64
"""Channels that are worked on together."""
CHUNK_SHAPE = (CHUNK, CHUNK)
NUM_LEVELS = 3
"""At which halves of 2^5, 2^4 and 2^3 tokens meet at a border. Loops over them keep only one in registers."""
MIN_LEVEL = 3
"""Binary logarithm of the halves that also meet themselves."""
MIN_BLOCK_LOG2_DECAY = -12.0
"""Log2-decay of a token at least, where factors may be above 1."""


class DecayedQueriesKeys(NamedTuple):
    """Of every value head."""

    q: Float[Array, "B T H K"]
    """Scaled, and decayed since the start of the chunk."""
    k: Float[Array, "B T H K"]
    """Decayed until the end of the chunk."""
    scores: Float[Array, "B H T C"]
    """Of each query with the keys of its chunk, scaled and decayed."""


class DecayedEraseKeys(NamedTuple):
    """Of every value head."""

    erase_k: Float[Array, "B T H K"]
    """What erases, decayed since the start of the chunk."""
    inverse: Float[Array, "B H T D"]
    """(I + A)^{-1} as in `mosaic_gpu_solve.py`, A the decayed products of what erases with earlier keys."""


def decay_queries_keys(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    document_gates: CumulativeDecay | None,
    scale: float,
    *,
    interpret: bool,
) -> DecayedQueriesKeys:
    """decay: of each token, a log2. docs: gates of one head, of documents alone."""

    def finish(scores, room, staged, targets):
        queries, keys, out = targets
        room[0][...] = (scores * scale).astype(room[0].dtype)
        plgpu.commit_smem()
        copy_smem_to_gmem((staged.at[0], queries), (staged.at[1], keys), (room[0], out))

    results = _launch_decay_kernel(
        q,
        k,
        decay,
        document_gates,
        scale,
        2,
        CHUNK,
        [smem_matrix(*CHUNK_SHAPE, tile=CHUNK)],
        finish,
        "decayed",
        interpret,
    )
    return DecayedQueriesKeys._make(results)


def decay_erase_keys(
    erase_k: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    document_gates: CumulativeDecay | None,
    *,
    interpret: bool,
) -> DecayedEraseKeys:
    """Arguments as of `decay_queries_keys`; e erases what is under the keys."""

    def finish(scores, room, staged, targets):
        store_unit_lower_inverse(scores, room, interpret)
        plgpu.commit_smem()
        copy_smem_to_gmem((staged.at[0], targets[0]), (room[0], targets[1]))

    room = inverse_scratch()
    return DecayedEraseKeys._make(
        _launch_decay_kernel(erase_k, k, decay, document_gates, 1.0, 1, 2 * CHUNK, room, finish, "erasing", interpret)
    )


def _launch_decay_kernel(
    q, k, decay, document_gates, scale, num_decayed_outputs, out_columns, scratch, finish, name, interpret
):
    """The first `num_decayed_outputs` of queries and keys, decayed, and what `finish` makes of the scores: so many columns per token.

    Each is per value head; `finish` gets room in shared memory.
    """
    (b, t, _, width), h = q.shape, decay.shape[2]

    def decay_chunk(q, k, decay, docs, tokens_out, out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(tokens, sums, meeting, staged, room, vectors, arrived):
            for n, x in enumerate((q, k)):
                group = lax.div(head, jnp.int32(h // x.shape[2]))
                plgpu.copy_gmem_to_smem(x.at[row, time, group], tokens.at[n], arrived)
            gates = copy_document_gates(docs, row, time, vectors, arrived)
            plgpu.barrier_wait(arrived)

            def add(part, scores):
                channels, zero = pl.ds(part * CHANNEL_TILE, CHANNEL_TILE), opaque_zero(part)
                x, y = (tokens.at[n, :, channels] for n in range(2))
                store_hi_lo_decay(load_vector(decay.at[row, time, head, channels], WGMMA), sums, interpret)
                plgpu.commit_smem()

                def meet(step, scores):
                    of_queries, of_keys = level_decay_factors(step, sums, (CHUNK, CHANNEL_TILE), interpret)
                    room = meeting.at[step]
                    room[...] = (load_smem_f32(y) * of_keys).astype(room.dtype)
                    plgpu.commit_smem()
                    early = (load_smem_f32(x) * of_queries).astype(room.dtype)
                    (all_pairs,) = wgmma_accumulate(
                        (zero_accumulator(*CHUNK_SHAPE), (early, room.transpose((1, 0)))), interpret=interpret
                    )
                    return jnp.where(level_mask(step), scores + all_pairs, scores)

                scores = lax.fori_loop(0, NUM_LEVELS, meet, scores)
                read, last = chunk_boundary_decay(sums, gates, (CHUNK, CHANNEL_TILE), zero, interpret)
                for n, (token, factor) in enumerate(((x, read * scale), (y, last))[:num_decayed_outputs]):
                    staged.at[n, :, channels][...] = (load_smem_f32(token) * factor).astype(staged.dtype)
                plgpu.commit_smem()  # all warps have read
                return scores

            scores = lax.fori_loop(0, width // CHANNEL_TILE, add, zero_accumulator(*CHUNK_SHAPE))
            targets = [*(x.at[row, time, head] for x in tokens_out), out.at[row, head, time]]
            finish(mask_across_documents(scores, gates), room, staged, targets)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(2, CHUNK, width, tile=CHANNEL_TILE),
            smem_matrix(4, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(NUM_LEVELS, CHUNK, CHANNEL_TILE, tile=CHANNEL_TILE),
            smem_matrix(num_decayed_outputs, CHUNK, width, tile=CHANNEL_TILE),
            scratch,
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + len(docs)),
        )

    tokens = jax.ShapeDtypeStruct((b, t, h, width), q.dtype)
    results = launch_kernel(
        decay_chunk,
        name=name,
        out_type=((tokens,) * num_decayed_outputs, jax.ShapeDtypeStruct((b, h, t, out_columns), q.dtype)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(q, k, decay, document_gates or ())
    return *results[0], results[1]


def copy_document_gates(document_gates: Sequence[Ref], row: Array, time: Any, scratch: Ref, arrived: Ref) -> list[Ref]:
    """The gates of a chunk on their way into shared memory."""
    for n, gate in enumerate(document_gates):
        plgpu.copy_gmem_to_smem(gate.at[row, 0, time], scratch.at[n], arrived)
    return [scratch.at[n] for n in range(len(document_gates))]


def store_hi_lo_decay(decay: Array, scratch: Ref, interpret: bool) -> None:
    """Leave the log2-decays [C, D] as operands of sums: their digits, and those of the bounded ones."""
    parts = (*hi_lo_split(decay, interpret), *hi_lo_split(jnp.maximum(decay, MIN_BLOCK_LOG2_DECAY), interpret))
    for n, part in enumerate(parts):
        scratch.at[n][...] = part


def masked_row_sums(mask: Array, hi_lo: tuple[Ref, Ref], shape: tuple[int, int], interpret: bool) -> Array:
    """For each row the sum of those rows of a matrix, in digits, that a mask names."""
    ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    (sums,) = wgmma_accumulate((zero_accumulator(*shape), (ones, hi_lo[0]), (ones, hi_lo[1])), interpret=interpret)
    return sums


def chunk_boundary_decay(
    sums: Ref, gates: list[Ref], shape: tuple[int, int], row_offset: Array | int, interpret: bool
) -> tuple[Array, Array]:
    """What is left of the state before the chunk at each token, and of each token at the chunk's end.

    zero: for `row_and_column_iota`.
    """
    i, t = row_and_column_iota(CHUNK_SHAPE, row_offset)
    parts = sums.at[0], sums.at[1]
    read, kept = (masked_row_sums(which, parts, shape, interpret) for which in (t <= i, t > i))
    if gates:
        query, key = (plgpu.load(gate, layout=WGMMA_ROW) for gate in gates)
        read += broadcast_per_row(query, shape)
        kept += broadcast_per_row(plgpu.load(gates[0].at[CHUNK - 1]) - key, shape)
    return jnp.exp2(read), jnp.exp2(kept)


def level_decay_factors(step: Array, sums: Ref, shape: tuple[int, int], interpret: bool) -> tuple[Array, Array]:
    """What queries and keys are multiplied with to meet at the borders of a level, of which `step` is the number."""
    level = NUM_LEVELS + MIN_LEVEL - 1 - step
    i, t = row_and_column_iota(CHUNK_SHAPE)
    inside = block_index(i, level) == block_index(t, level)
    which = inside & (((half_index(i, level) == 1) & (t <= i)) | ((half_index(i, level) == 0) & (t > i)))
    first = jnp.where(level == MIN_LEVEL, 2, 0)
    exponents = masked_row_sums(which, (sums.at[first], sums.at[first + 1]), shape, interpret)
    i, _ = row_and_column_iota(shape)
    beyond = level == MIN_LEVEL  # queries before the border grow towards it, and so do keys behind it
    of_queries = jnp.where((half_index(i, level) == 0) & beyond, -exponents, exponents)
    of_keys = jnp.where((half_index(i, level) == 1) & beyond, -exponents, exponents)
    return jnp.exp2(of_queries), jnp.exp2(of_keys)


def level_mask(step: Array) -> Array:
    """The pairs of queries, along the rows, and keys that a level is for."""
    level = NUM_LEVELS + MIN_LEVEL - 1 - step
    i, j = row_and_column_iota(CHUNK_SHAPE)
    same = block_index(i, level + 1) == block_index(j, level + 1)
    across = block_index(i, level) > block_index(j, level)
    inside = (block_index(i, level) == block_index(j, level)) & (i >= j) & (level == MIN_LEVEL)
    return same & (across | inside)


def mask_across_documents(scores: Array, gates: list[Ref]) -> Array:
    """Scores of the pairs that are in one document."""
    if not gates:
        return scores
    query, key = gates
    gap = broadcast_per_row(plgpu.load(query, layout=WGMMA_ROW), CHUNK_SHAPE) - broadcast_per_column(
        plgpu.load(key, layout=WGMMA_COL), CHUNK_SHAPE
    )
    return scores * jnp.exp2(jnp.minimum(gap, 0.0))


def half_index(index: Array, level: Array) -> Array:
    """0 in a first half of 2^level tokens, 1 in a second."""
    return lax.bitwise_and(block_index(index, level), 1)
