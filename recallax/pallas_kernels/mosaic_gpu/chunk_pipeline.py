"""A warp-specialised pipeline over the chunks of one head: a producer warpgroup loads, consumer warpgroups compute."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK, Ref, smem_transforms

PRODUCER_REGISTERS = 40
"""Registers per thread of the producer warpgroup. The consumer warpgroups share those that it releases."""


def chunk_pipeline(
    body: Callable[..., Any],
    tokens: Sequence[Ref],
    gates: Sequence[Ref],
    compute_context: Callable[[Callable[[Any], Any]], None],
    num_consumer_wgs: int,
    tile: int | None,
    num_prefetch: int,
    chunk_order: Callable[[Any], Any],
) -> None:
    """Call `body((step,), *token_blocks, *gate_blocks, carry) -> carry` for each chunk.

    Args:
        body: Work of the consumer warpgroups on one chunk; the blocks are references into shared memory.
        tokens: Matrices [T, width] in global memory, in bfloat16.
        gates: Vectors in global memory with the same number of entries for every chunk.
        compute_context: `compute_context(pipeline)` calls `pipeline(initial_carry) -> final_carry` once.
        num_consumer_wgs: Consumer warpgroups, on the axis "warpgroup".
        tile: Columns of a shared-memory tile of the matrices; None: the width of each matrix.
        num_prefetch: Chunks that TMA loads ahead of the current one.
        chunk_order: The chunk of each step.
    """
    num_chunks = tokens[0].shape[0] // CHUNK

    def index_map(step):
        return (chunk_order(step), 0)

    token_specs = [
        plgpu.BlockSpec((CHUNK, x.shape[1]), index_map, transforms=smem_transforms(tile or x.shape[1])) for x in tokens
    ]
    gate_specs = [plgpu.BlockSpec((x.shape[0] // num_chunks,), lambda step: (chunk_order(step),)) for x in gates]
    plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(num_chunks,),
        in_specs=[*token_specs, *gate_specs],
        max_concurrent_steps=num_prefetch + 1,
        num_compute_wgs=num_consumer_wgs,
        wg_axis="warpgroup",
        memory_registers=PRODUCER_REGISTERS,
        compute_context=compute_context,
    )(*tokens, *gates)
