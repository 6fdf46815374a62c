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

from recallax.pallas_kernels.linear_attention.gates import Gates
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    COLUMNS,
    MATRIX,
    ROWS,
    Ref,
    accumulate,
    along_columns,
    along_rows,
    block_of,
    digits,
    launch,
    load,
    matrix,
    rows_and_columns,
    send,
    unknown_zero,
    vector,
    zeros,
)
from recallax.pallas_kernels.mosaic_gpu_solve import inverse_rooms, left_inverse

PART = 64
"""Channels that are worked on together."""
SQUARE = (CHUNK, CHUNK)
LEVELS = 3
"""At which halves of 2^5, 2^4 and 2^3 tokens meet at a border. Loops over them keep only one in registers."""
MIDDLE = 3
"""Binary logarithm of the halves that also meet themselves."""
LOWEST = -12.0
"""Log2-decay of a token at least, where factors may be above 1."""


class Decayed(NamedTuple):
    """Of every value head."""

    q: Float[Array, "B T H K"]
    """Scaled, and decayed since the start of the chunk."""
    k: Float[Array, "B T H K"]
    """Decayed until the end of the chunk."""
    scores: Float[Array, "B H T C"]
    """Of each query with the keys of its chunk, scaled and decayed."""


class Erasing(NamedTuple):
    """Of every value head."""

    e: Float[Array, "B T H K"]
    """What erases, decayed since the start of the chunk."""
    inverse: Float[Array, "B H T D"]
    """(I + A)^{-1} as in `mosaic_gpu_solve.py`, A the decayed products of what erases with earlier keys."""


def decayed(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    docs: Gates | None,
    scale: float,
    *,
    interpret: bool,
) -> Decayed:
    """decay: of each token, a log2. docs: gates of one head, of documents alone."""

    def finish(scores, room, staged, targets):
        queries, keys, out = targets
        room[0][...] = (scores * scale).astype(room[0].dtype)
        plgpu.commit_smem()
        send((staged.at[0], queries), (staged.at[1], keys), (room[0], out))

    results = _launched(q, k, decay, docs, scale, 2, CHUNK, [matrix(*SQUARE, tile=CHUNK)], finish, "decayed", interpret)
    return Decayed._make(results)


def erasing(
    e: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    decay: Float[Array, "B T H K"],
    docs: Gates | None,
    *,
    interpret: bool,
) -> Erasing:
    """Arguments as of `decayed`; e erases what is under the keys."""

    def finish(scores, room, staged, targets):
        left_inverse(scores, room, interpret)
        plgpu.commit_smem()
        send((staged.at[0], targets[0]), (room[0], targets[1]))

    room = inverse_rooms()
    return Erasing._make(_launched(e, k, decay, docs, 1.0, 1, 2 * CHUNK, room, finish, "erasing", interpret))


def _launched(q, k, decay, docs, scale, kept, columns, room, finish, name, interpret):
    """The first `kept` of queries and keys, decayed, and what `finish` makes of the scores: so many columns per token.

    Each is per value head; `finish` gets room in shared memory.
    """
    (b, t, _, width), h = q.shape, decay.shape[2]

    def decay_chunk(q, k, decay, docs, tokens_out, out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(tokens, sums, meeting, staged, room, vectors, arrived):
            for n, x in enumerate((q, k)):
                group = lax.div(head, jnp.int32(h // x.shape[2]))
                plgpu.copy_gmem_to_smem(x.at[row, time, group], tokens.at[n], arrived)
            gates = documents_in(docs, row, time, vectors, arrived)
            plgpu.barrier_wait(arrived)

            def add(part, scores):
                channels, zero = pl.ds(part * PART, PART), unknown_zero(part)
                x, y = (tokens.at[n, :, channels] for n in range(2))
                summed_digits(vector(decay.at[row, time, head, channels], MATRIX), sums, interpret)
                plgpu.commit_smem()

                def meet(step, scores):
                    of_queries, of_keys = meeting_factors(step, sums, (CHUNK, PART), interpret)
                    room = meeting.at[step]
                    room[...] = (load(y) * of_keys).astype(room.dtype)
                    plgpu.commit_smem()
                    early = (load(x) * of_queries).astype(room.dtype)
                    (all_pairs,) = accumulate((zeros(*SQUARE), (early, room.transpose((1, 0)))), interpret=interpret)
                    return jnp.where(meets(step), scores + all_pairs, scores)

                scores = lax.fori_loop(0, LEVELS, meet, scores)
                read, last = outside(sums, gates, (CHUNK, PART), zero, interpret)
                for n, (token, factor) in enumerate(((x, read * scale), (y, last))[:kept]):
                    staged.at[n, :, channels][...] = (load(token) * factor).astype(staged.dtype)
                plgpu.commit_smem()  # all warps have read
                return scores

            scores = lax.fori_loop(0, width // PART, add, zeros(*SQUARE))
            targets = [*(x.at[row, time, head] for x in tokens_out), out.at[row, head, time]]
            finish(between_documents(scores, gates), room, staged, targets)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            matrix(2, CHUNK, width, tile=PART),
            matrix(4, CHUNK, PART, tile=PART),
            matrix(LEVELS, CHUNK, PART, tile=PART),
            matrix(kept, CHUNK, width, tile=PART),
            room,
            plgpu.SMEM((2, CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + len(docs)),
        )

    tokens = jax.ShapeDtypeStruct((b, t, h, width), q.dtype)
    results = launch(
        decay_chunk,
        name=name,
        out=((tokens,) * kept, jax.ShapeDtypeStruct((b, h, t, columns), q.dtype)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        workers=1,
        copiers=0,
        interpret=interpret,
    )(q, k, decay, docs or ())
    return *results[0], results[1]


def documents_in(docs: Sequence[Ref], row: Array, time: Any, room: Ref, arrived: Ref) -> list[Ref]:
    """The gates of a chunk on their way into shared memory."""
    for n, gate in enumerate(docs):
        plgpu.copy_gmem_to_smem(gate.at[row, 0, time], room.at[n], arrived)
    return [room.at[n] for n in range(len(docs))]


def summed_digits(decay: Array, room: Ref, interpret: bool) -> None:
    """Leave the log2-decays [C, D] as operands of sums: their digits, and those of the bounded ones."""
    parts = (*digits(decay, interpret), *digits(jnp.maximum(decay, LOWEST), interpret))
    for n, part in enumerate(parts):
        room.at[n][...] = part


def sums_of(which: Array, parts: tuple[Ref, Ref], shape: tuple[int, int], interpret: bool) -> Array:
    """For each row the sum of those rows of a matrix, in digits, that a mask names."""
    ones = jnp.where(which, 1.0, 0.0).astype(jnp.bfloat16)
    (sums,) = accumulate((zeros(*shape), (ones, parts[0]), (ones, parts[1])), interpret=interpret)
    return sums


def outside(
    sums: Ref, gates: list[Ref], shape: tuple[int, int], zero: Array | int, interpret: bool
) -> tuple[Array, Array]:
    """What is left of the state before the chunk at each token, and of each token at the chunk's end.

    zero: for `rows_and_columns`.
    """
    i, t = rows_and_columns(SQUARE, zero)
    parts = sums.at[0], sums.at[1]
    read, kept = (sums_of(which, parts, shape, interpret) for which in (t <= i, t > i))
    if gates:
        query, key = (plgpu.load(gate, layout=ROWS) for gate in gates)
        read += along_rows(query, shape)
        kept += along_rows(plgpu.load(gates[0].at[CHUNK - 1]) - key, shape)
    return jnp.exp2(read), jnp.exp2(kept)


def meeting_factors(step: Array, sums: Ref, shape: tuple[int, int], interpret: bool) -> tuple[Array, Array]:
    """What queries and keys are multiplied with to meet at the borders of a level, of which `step` is the number."""
    level = LEVELS + MIDDLE - 1 - step
    i, t = rows_and_columns(SQUARE)
    inside = block_of(i, level) == block_of(t, level)
    which = inside & (((half(i, level) == 1) & (t <= i)) | ((half(i, level) == 0) & (t > i)))
    first = jnp.where(level == MIDDLE, 2, 0)
    exponents = sums_of(which, (sums.at[first], sums.at[first + 1]), shape, interpret)
    i, _ = rows_and_columns(shape)
    beyond = level == MIDDLE  # queries before the border grow towards it, and so do keys behind it
    of_queries = jnp.where((half(i, level) == 0) & beyond, -exponents, exponents)
    of_keys = jnp.where((half(i, level) == 1) & beyond, -exponents, exponents)
    return jnp.exp2(of_queries), jnp.exp2(of_keys)


def meets(step: Array) -> Array:
    """The pairs of queries, along the rows, and keys that a level is for."""
    level = LEVELS + MIDDLE - 1 - step
    i, j = rows_and_columns(SQUARE)
    same = block_of(i, level + 1) == block_of(j, level + 1)
    across = block_of(i, level) > block_of(j, level)
    inside = (block_of(i, level) == block_of(j, level)) & (i >= j) & (level == MIDDLE)
    return same & (across | inside)


def between_documents(scores: Array, gates: list[Ref]) -> Array:
    """Scores of the pairs that are in one document."""
    if not gates:
        return scores
    query, key = gates
    gap = along_rows(plgpu.load(query, layout=ROWS), SQUARE) - along_columns(plgpu.load(key, layout=COLUMNS), SQUARE)
    return scores * jnp.exp2(jnp.minimum(gap, 0.0))


def half(index: Array, level: Array) -> Array:
    """0 in a first half of 2^level tokens, 1 in a second."""
    return lax.bitwise_and(block_of(index, level), 1)
