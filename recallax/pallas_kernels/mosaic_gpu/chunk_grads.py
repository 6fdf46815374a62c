"""Launch of a kernel that computes the gradients of queries and keys, chunk by chunk and 64 channels at a time.

It follows the loops over time: all states and their gradients are known, so every chunk is independent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.kernel_launch import launch_kernel
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    Ref,
    copy_smem_to_gmem,
    shared_group,
    smem_matrix,
)

CHANNEL_TILE = 64
"""Channels of a block: the fewest rows of a register matrix. Sums over channels are partial sums over them."""
TILE_SHAPE = (CHUNK, CHANNEL_TILE)


class ChunkGradInputs(NamedTuple):
    """Arrays of the launch. T is a multiple of the chunk, and H a multiple of G."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    values: tuple[Float[Array, "B T H V"], ...]
    states: tuple[Float[Array, "B H N K V"], ...]
    weights: tuple[Float[Array, "B H T ..."], ...]
    """Further arrays, which blocks read in global memory."""


class ChunkGradRefs(NamedTuple):
    """References of one block."""

    qk: Ref
    """[2, C, D]: queries and keys in shared memory."""
    values: Ref
    """[number of values, C, V] in shared memory."""
    states: Ref
    """[number of states, D, V] in shared memory."""
    weights: list[Ref]
    """The chunk's part of the weights, in global memory."""
    sums: list[Ref]
    """Outputs: sums over the channels of the block, in global memory."""
    pairs: Ref
    """[2, C, C]: scratch for two matrices of pairs of tokens."""
    grads: Ref
    """[2, C, D]: outputs: the gradients of queries and keys."""


def launch_chunk_grads(
    chunk: Callable[[ChunkGradRefs], None], inputs: ChunkGradInputs, channel_sums: tuple[tuple[int, ...], ...]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], tuple[Float[Array, "B H P T ..."], ...]]:
    """Call `chunk` in one block of threads for each chunk and tile of channels.

    Args:
        chunk: Computes the sums and the gradients of a block.
        inputs: Arrays.
        channel_sums: Shape per token of each sum over channels.

    Returns:
        The gradients of queries and keys per value head, and the sums over each of P tiles of channels.
    """
    (b, t, groups, k_dim), (h, v_dim) = inputs.q.shape, inputs.values[0].shape[2:]
    num_values, num_states = len(inputs.values), len(inputs.states)

    def gradients(inputs, dq, dk, sums):
        row, head, part, n = (lax.axis_index(name) for name in ("row", "head", "part", "chunk"))
        time, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(part * CHANNEL_TILE, CHANNEL_TILE)

        def scoped(qk, values, states, pairs, grads, loaded):
            group = shared_group(head, h, groups)
            for i, x in enumerate((inputs.q, inputs.k)):
                plgpu.copy_gmem_to_smem(x.at[row, time, group, channels], qk.at[i], loaded)
            for i, x in enumerate(inputs.values):
                plgpu.copy_gmem_to_smem(x.at[row, time, head], values.at[i], loaded)
            for i, x in enumerate(inputs.states):
                plgpu.copy_gmem_to_smem(x.at[row, head, n, channels], states.at[i], loaded)
            plgpu.barrier_wait(loaded)
            weights = [x.at[row, head, time] for x in inputs.weights]
            own_sums = [x.at[row, head, part, time] for x in sums]
            chunk(ChunkGradRefs(qk, values, states, weights, own_sums, pairs, grads))
            plgpu.commit_smem()
            copy_smem_to_gmem(*((grads.at[i], x.at[row, time, head, channels]) for i, x in enumerate((dq, dk))))
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            smem_matrix(2, *TILE_SHAPE, tile=64),
            smem_matrix(num_values, CHUNK, v_dim, tile=64),
            smem_matrix(num_states, CHANNEL_TILE, v_dim, tile=64),
            smem_matrix(2, *CHUNK_SHAPE, tile=64),
            smem_matrix(2, *TILE_SHAPE, tile=64),
            plgpu.Barrier(num_arrivals=2 + num_values + num_states),
        )

    grads = jax.ShapeDtypeStruct((b, t, h, k_dim), inputs.q.dtype)
    num_tiles = k_dim // CHANNEL_TILE
    sums = tuple(jax.ShapeDtypeStruct((b, h, num_tiles, t, *shape), jnp.float32) for shape in channel_sums)
    return launch_kernel(
        gradients,
        out_type=(grads, grads, sums),
        grid={"row": b, "head": h, "part": num_tiles, "chunk": t // CHUNK},
        num_consumer_wgs=1,
        num_producer_wgs=0,
    )(inputs)
