"""A loop over the chunks of one head that carries one or more states [K, V] in registers.

The delta rule and the linear neural memory use it: each warpgroup owns 64 columns of the values and of the states.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import HI_LO_COLUMNS
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    Ref,
    hi_lo_products,
    hi_lo_split,
    opaque_zero,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

WG_COLUMNS = 64
"""Columns of the values and of the states that a warpgroup owns: a tile of the tensor cores."""
WG_SHAPE = (CHUNK, WG_COLUMNS)
"""Shape of the values of one chunk that a warpgroup owns."""
NUM_PREFETCH = 1
"""Chunks that TMA loads ahead of the current one: with four or more inputs, a chunk takes much shared memory."""


class StateLoopConfig(NamedTuple):
    """Sizes of the loop over the chunks of one head."""

    num_tokens: int
    head_k_dim: int
    head_v_dim: int
    """Columns of the values of a block."""
    scale: float
    """Factor of the scores."""

    @property
    def num_consumer_wgs(self) -> int:
        """Computing warpgroups of a block."""
        return self.head_v_dim // WG_COLUMNS


def state_chunk_loop(
    config: StateLoopConfig,
    chunk: Callable[..., list[jax.Array]],
    tokens: list[Ref],
    vectors: list[Ref],
    initial_states: list[Ref],
    final_states: list[Ref],
    scratch_heights: tuple[int, ...],
    *,
    reverse: bool,
) -> None:
    """Call `chunk(scratch, columns, time, step, tokens, vectors, states) -> states` for each chunk.

    Args:
        config: Sizes.
        chunk: Work on one chunk: `scratch` are matrices in shared memory, `columns` and `time` the slices of the
            warpgroup's columns and of the chunk, `step` the index of the chunk, `tokens` and `vectors` its blocks in
            shared memory, and `states` register arrays [K, 64].
        tokens: References [T, width] in global memory.
        vectors: References in global memory with the same number of entries per chunk.
        initial_states: References [K, V], float32.
        final_states: References [K, V] to the states after the last chunk.
        scratch_heights: Rows of each scratch matrix.
        reverse: Go backward in time.
    """
    warpgroup, num_chunks = lax.axis_index("warpgroup"), config.num_tokens // CHUNK
    columns = pl.ds(warpgroup * WG_COLUMNS, WG_COLUMNS)

    def order(step):
        return num_chunks - 1 - step if reverse else step

    def scoped(*scratch):
        def context(pipeline):
            states = pipeline([plgpu.load(x.at[:, columns], layout=WGMMA, optimized=False) for x in initial_states])
            for final_state, state in zip(final_states, states, strict=True):
                final_state[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def body(index, *refs):
            *refs, states = refs
            step = order(index[0])
            own_scratch = [x.at[opaque_zero(index[0]), warpgroup] for x in scratch]
            chunk_tokens, chunk_vectors = refs[: len(tokens)], refs[len(tokens) :]
            time = pl.ds(step * CHUNK, CHUNK)
            return chunk(own_scratch, columns, time, step, chunk_tokens, chunk_vectors, states)

        chunk_pipeline(body, tokens, vectors, context, config.num_consumer_wgs, WG_COLUMNS, NUM_PREFETCH, order)

    scratch = [
        smem_matrix(1, config.num_consumer_wgs, height, WG_COLUMNS, tile=WG_COLUMNS) for height in scratch_heights
    ]
    pl.run_scoped(scoped, *scratch, collective_axes="warpgroup")


def apply_inverse(
    inverse: Ref, x: jax.Array, scratch: tuple[Ref, Ref], *others: Any, transposed: bool = False
) -> list[jax.Array]:
    """Compute T x, or T^T x, and other sums of products.

    Args:
        inverse: T of a chunk as high and low columns, in shared memory.
        x: Right-hand sides [C, 64], float32.
        scratch: Two matrices for the high and low part of x. They may be overwritten when the function returns.
        *others: Further arguments of `wgmma_accumulate`.
        transposed: Apply T^T.

    Returns:
        The product, then the other sums.
    """
    for ref, part in zip(scratch, hi_lo_split(x), strict=True):
        ref[...] = part
    plgpu.commit_smem()
    parts = [inverse.at[:, half] for half in HI_LO_COLUMNS]
    if transposed:
        parts = [part.transpose((1, 0)) for part in parts]
    products = hi_lo_products((parts[0], parts[1]), scratch)
    sums = wgmma_accumulate((zero_accumulator(*x.shape), *products), *others)
    plgpu.commit_smem()  # all warps have read
    return sums
