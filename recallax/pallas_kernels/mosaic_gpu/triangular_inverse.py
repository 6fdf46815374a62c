"""Inverses of unit lower triangular matrices, one per chunk: T = (I + A)^{-1} of the delta rule.

    A_ij = b_i (k_i.k_j) 2^(L_i - L_j) below the diagonal

Blocks of 2 rows on the diagonal are inverted first. Pairs of blocks are then merged, X <- X - (X A across the pair) X,
with products on the tensor cores. Every matrix is a sum of two bfloat16 matrices: with one alone the error is 1 % where
keys are alike. Neumann's series takes fewer steps, but there its error exceeds the values.
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
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA_COL,
    WGMMA_ROW,
    Ref,
    block_index,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    hi_lo_products,
    hi_lo_split,
    load_vector,
    row_and_column_iota,
    shared_group,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

HI_LO_COLUMNS = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)
"""Columns of the high and of the low matrix of a stored inverse."""
CHUNK_LOG2 = CHUNK.bit_length() - 1
"""Levels of merged blocks: from 2 tokens to the whole chunk."""


def chunk_inverses(
    k: Float[Array, "B T G K"], gates: CumulativeDecay | None, erase: Float[Array, "B H T"]
) -> Float[Array, "B H T D"]:
    """Compute T of every chunk.

    Args:
        k: Keys in bfloat16; T is a multiple of the chunk, and H a multiple of G.
        gates: Cumulative decays; None: no decay.
        erase: Erase strength b of each token.

    Returns:
        Row i of T for each token i of a chunk, in bfloat16; D = 2 x 64: the rounded values, then the rounding errors.
    """
    (b, t, groups, k_dim), h = k.shape, erase.shape[1]

    def solve(k, gates, erase, out):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(keys, scratch, loaded):
            plgpu.copy_gmem_to_smem(k.at[row, time, shared_group(head, h, groups)], keys, loaded)
            plgpu.barrier_wait(loaded)
            (scores,) = wgmma_accumulate((zero_accumulator(*CHUNK_SHAPE), (keys, keys.transpose((1, 0)))))
            scores *= broadcast_per_row(load_vector(erase.at[row, head, time], WGMMA_ROW), scores.shape)
            if gates:
                query, key = (gate.at[row, head, time] for gate in gates)
                log2_decay = broadcast_per_row(load_vector(query, WGMMA_ROW), scores.shape)
                log2_decay -= broadcast_per_column(load_vector(key, WGMMA_COL), scores.shape)
                i, j = row_and_column_iota(scores.shape)
                scores *= jnp.exp2(jnp.where(i > j, log2_decay, -jnp.inf))
            store_unit_lower_inverse(scores, scratch)
            plgpu.commit_smem()
            copy_smem_to_gmem((scratch[0], out.at[row, head, time]))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, smem_matrix(CHUNK, k_dim, tile=64), inverse_scratch(), plgpu.Barrier())

    return launch_kernel(
        solve,
        out_type=jax.ShapeDtypeStruct((b, h, t, 2 * CHUNK), jnp.bfloat16),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(k, gates or (), erase)


def inverse_scratch() -> list[Any]:
    """Return the scratch types of `store_unit_lower_inverse`: the result, A, and two buffers for X."""
    shapes = ((CHUNK, 2 * CHUNK), (2, CHUNK, CHUNK), (2, 2, CHUNK, CHUNK))
    return [smem_matrix(*shape, tile=64) for shape in shapes]


def store_unit_lower_inverse(scores: jax.Array, scratch: Sequence[Ref]) -> None:
    """Store (I + A)^{-1} as high and low columns in the first scratch matrix.

    Args:
        scores: Matrix [C, C] whose entries below the diagonal are A; the others are not read.
        scratch: References of `inverse_scratch`. The two buffers for X alternate, so that no warp overwrites a matrix
            that another warp still reads.
    """
    out, a, x_buffers = scratch
    i, j = row_and_column_iota(scores.shape)
    scores = jnp.where(i > j, scores, 0.0)
    for n, part in enumerate(hi_lo_split(scores)):
        a.at[n][...] = part
    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(block_index(i, 1) == block_index(j, 1), scores, 0.0)
    for level in range(1, CHUNK_LOG2):
        x = x_buffers.at[level % 2]
        parts = hi_lo_split(inverse)
        for n, part in enumerate(parts):
            x.at[n][...] = part
        plgpu.commit_smem()
        (product,) = wgmma_accumulate((zero_accumulator(*scores.shape), *hi_lo_products(parts, (a.at[0], a.at[1]))))
        across_pair = (block_index(i, level + 1) == block_index(j, level + 1)) & (
            block_index(i, level) > block_index(j, level)
        )
        update = hi_lo_split(jnp.where(across_pair, -product, 0.0))
        (inverse,) = wgmma_accumulate((inverse, *hi_lo_products(update, (x.at[0], x.at[1]))))
    for columns, part in zip(HI_LO_COLUMNS, hi_lo_split(inverse), strict=True):
        out.at[:, columns][...] = part
