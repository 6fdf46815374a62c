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

from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA_COL,
    WGMMA_ROW,
    Ref,
    block_index,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    hi_lo_products,
    hi_lo_split,
    launch_kernel,
    load_vector,
    row_and_column_iota,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

HI_LO_COLUMNS = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
"""Columns of the two matrices whose sum an inverse is."""


def chunk_inverses(
    k: Float[Array, "B T G K"], gates: CumulativeDecay | None, erase: Float[Array, "B H T"], *, interpret: bool
) -> Float[Array, "B H T D"]:
    """Row i of T for each token i of a chunk, D = 2 x 64: rounded to bfloat16, and what is lost by that."""
    (b, t, groups, width), h = k.shape, erase.shape[1]

    def solve(k, gates, erase, out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(keys, rooms, arrived):
            plgpu.copy_gmem_to_smem(k.at[row, time, lax.div(head, jnp.int32(h // groups))], keys, arrived)
            plgpu.barrier_wait(arrived)
            (scores,) = wgmma_accumulate(
                (zero_accumulator(CHUNK, CHUNK), (keys, keys.transpose((1, 0)))), interpret=interpret
            )
            scores *= broadcast_per_row(load_vector(erase.at[row, head, time], WGMMA_ROW), scores.shape)
            if gates:
                queries, key = (gate.at[row, head, time] for gate in gates)
                gap = broadcast_per_row(load_vector(queries, WGMMA_ROW), scores.shape)
                gap -= broadcast_per_column(load_vector(key, WGMMA_COL), scores.shape)
                i, j = row_and_column_iota(scores.shape)
                scores *= jnp.exp2(jnp.where(i > j, gap, -jnp.inf))
            store_unit_lower_inverse(scores, rooms, interpret)
            plgpu.commit_smem()
            copy_smem_to_gmem((rooms[0], out.at[row, head, time]))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, smem_matrix(CHUNK, width, tile=64), inverse_scratch(), plgpu.Barrier())

    return launch_kernel(
        solve,
        out_type=jax.ShapeDtypeStruct((b, h, t, 2 * CHUNK), jnp.bfloat16),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(k, gates or (), erase)


def inverse_scratch() -> list[Any]:
    """The shared memory of `store_unit_lower_inverse`."""
    shapes = ((CHUNK, 2 * CHUNK), (2, CHUNK, CHUNK), (2, 2, CHUNK, CHUNK))
    return [smem_matrix(*shape, tile=64) for shape in shapes]


def store_unit_lower_inverse(scores: jax.Array, scratch: Sequence[Ref], interpret: bool) -> None:
    """Leave the inverse's two matrices in the first of the rooms; scores on and above the diagonal are not read.

    The second is for A, the third for X, used in turns so that no warp overwrites what another still reads.
    """
    out, a, x = scratch
    i, j = row_and_column_iota(scores.shape)
    scores = jnp.where(i > j, scores, 0.0)
    for n, part in enumerate(hi_lo_split(scores, interpret)):
        a.at[n][...] = part
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(block_index(i, 1) == block_index(j, 1), scores, 0.0)
    for level in range(1, 6):
        room = x.at[level % 2]
        parts = hi_lo_split(inverse, interpret)
        for n, part in enumerate(parts):
            room.at[n][...] = part
        plgpu.commit_smem()
        (across,) = wgmma_accumulate(
            (zero_accumulator(*scores.shape), *hi_lo_products(parts, (a.at[0], a.at[1]))), interpret=interpret
        )
        pair = (block_index(i, level + 1) == block_index(j, level + 1)) & (
            block_index(i, level) > block_index(j, level)
        )
        corner = hi_lo_split(jnp.where(pair, -across, 0.0), interpret)
        (inverse,) = wgmma_accumulate((inverse, *hi_lo_products(corner, (room.at[0], room.at[1]))), interpret=interpret)
    for columns, part in zip(HI_LO_COLUMNS, hi_lo_split(inverse, interpret), strict=True):
        out.at[:, columns][...] = part
