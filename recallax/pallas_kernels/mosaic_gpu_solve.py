"""Unit lower triangular systems on Hopper: the inverse that a chunk of the delta rule needs, a block of threads each.

    T = (I + A)^{-1},   A_ij = b_i (k_i.k_j) 2^(L_i - L_j) below the diagonal

Blocks of the diagonal are inverted from 2 rows up and pairs of them merged, X <- X - (X A across the pair) X, which are
products on the tensor cores. Matrices are sums of two bfloat16 ones throughout: one alone is off by a percent where
keys are alike, and Neumann's series, which would take fewer steps, by more than there is.
"""

from collections.abc import Sequence
from typing import Any

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
    ROWS,
    Ref,
    accumulate,
    along_columns,
    along_rows,
    block_of,
    digits,
    exactly,
    launch,
    matrix,
    rows_and_columns,
    send,
    vector,
    zeros,
)

HALVES = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
"""Columns of the two matrices whose sum an inverse is."""


def inverses(
    k: Float[Array, "B T G K"], gates: Gates | None, erase: Float[Array, "B H T"], *, interpret: bool
) -> Float[Array, "B H T D"]:
    """Row i of T for each token i of a chunk, D = 2 x 64: rounded to bfloat16, and what is lost by that."""
    (b, t, groups, width), h = k.shape, erase.shape[1]

    def solve(k, gates, erase, out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(keys, rooms, arrived):
            plgpu.copy_gmem_to_smem(k.at[row, time, lax.div(head, jnp.int32(h // groups))], keys, arrived)
            plgpu.barrier_wait(arrived)
            (scores,) = accumulate((zeros(CHUNK, CHUNK), (keys, keys.transpose((1, 0)))), interpret=interpret)
            scores *= along_rows(vector(erase.at[row, head, time], ROWS), scores.shape)
            if gates:
                queries, key = (gate.at[row, head, time] for gate in gates)
                gap = along_rows(vector(queries, ROWS), scores.shape)
                gap -= along_columns(vector(key, COLUMNS), scores.shape)
                i, j = rows_and_columns(scores.shape)
                scores *= jnp.exp2(jnp.where(i > j, gap, -jnp.inf))
            left_inverse(scores, rooms, interpret)
            plgpu.commit_smem()
            send((rooms[0], out.at[row, head, time]))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, matrix(CHUNK, width, tile=64), inverse_rooms(), plgpu.Barrier())

    return launch(
        solve,
        out=jax.ShapeDtypeStruct((b, h, t, 2 * CHUNK), jnp.bfloat16),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        workers=1,
        copiers=0,
        interpret=interpret,
    )(k, gates or (), erase)


def inverse_rooms() -> list[Any]:
    """The shared memory of `left_inverse`."""
    shapes = ((CHUNK, 2 * CHUNK), (2, CHUNK, CHUNK), (2, 2, CHUNK, CHUNK))
    return [matrix(*shape, tile=64) for shape in shapes]


def left_inverse(scores: jax.Array, rooms: Sequence[Ref], interpret: bool) -> None:
    """Leave the inverse's two matrices in the first of the rooms; scores on and above the diagonal are not read.

    The second is for A, the third for X, used in turns so that no warp overwrites what another still reads.
    """
    out, a, x = rooms
    i, j = rows_and_columns(scores.shape)
    scores = jnp.where(i > j, scores, 0.0)
    for n, part in enumerate(digits(scores, interpret)):
        a.at[n][...] = part
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(block_of(i, 1) == block_of(j, 1), scores, 0.0)
    for level in range(1, 6):
        room = x.at[level % 2]
        parts = digits(inverse, interpret)
        for n, part in enumerate(parts):
            room.at[n][...] = part
        plgpu.commit_smem()
        (across,) = accumulate((zeros(*scores.shape), *exactly(parts, (a.at[0], a.at[1]))), interpret=interpret)
        pair = (block_of(i, level + 1) == block_of(j, level + 1)) & (block_of(i, level) > block_of(j, level))
        corner = digits(jnp.where(pair, -across, 0.0), interpret)
        (inverse,) = accumulate((inverse, *exactly(corner, (room.at[0], room.at[1]))), interpret=interpret)
    for columns, part in zip(HALVES, digits(inverse, interpret), strict=True):
        out.at[:, columns][...] = part
