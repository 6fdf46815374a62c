"""Scan over the chunks of a sequence in a TPU kernel, with the state carried in VMEM.

A kernel is defined by a body for one chunk of one head, in plain jax.numpy on matrices:

    body(states, *inputs) -> (states, outputs)

`chunk_scan` runs it over all rows, heads and chunks. A grid step applies it to the same chunk of several heads by
`jax.vmap`, whose independent products overlap in the matrix units. Chunks are the last axis of the grid and run
sequentially, forward or backward in time; the states stay in VMEM, in the blocks that become the final states. Bodies
are pure, so backward kernels call `jax.vjp` on them inside the kernel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import interpreting
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import ChunkGrid
from recallax.pallas_kernels.mosaic_tpu.chunk_operands import ChunkOperand, PerChunkOperand, StateOperand, output_shape

INTERPRET_PARAMS: Any = pltpu.InterpretParams()
"""Interpreter options of the kernels within `dispatch.interpret_kernels()`."""

type Matrices = tuple[Array, ...]
type ChunkBody = Callable[..., tuple[Matrices, Matrices]]
"""(states, one matrix per input) -> (states, one matrix per output)"""


def chunk_scan(
    name: str,
    body: ChunkBody,
    chunk_grid: ChunkGrid,
    states: Sequence[Float[Array, "B H _ _"]],
    inputs: Sequence[ChunkOperand],
    outputs: Sequence[ChunkOperand],
) -> tuple[Matrices, Matrices]:
    """Run `body` over all rows, heads and chunks.

    Args:
        name: Name of the kernel.
        body: (states, one matrix per input) -> (states, one matrix per output), all float32.
        chunk_grid: The grid.
        states: Initial states in float32.
        inputs: Input arrays.
        outputs: Shapes, dtypes and layouts of the outputs; values are cast to the dtype.

    Returns:
        Final states [B, H, ...] in float32, and the outputs.
    """
    state_operands = [StateOperand(x) for x in states]
    all_inputs, all_outputs = (*state_operands, *inputs), (*state_operands, *outputs)
    num_states, num_inputs = len(state_operands), len(all_inputs)

    def kernel(*refs: Any) -> None:
        initial_refs, input_refs = refs[:num_states], refs[num_states:num_inputs]
        state_refs, output_refs = refs[num_inputs : num_inputs + num_states], refs[num_inputs + num_states :]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for ref, initial in zip(state_refs, initial_refs, strict=True):
                ref[...] = initial[...]

        before = tuple(x.read(ref, chunk_grid) for x, ref in zip(state_operands, state_refs, strict=True))
        matrices = (x.read(ref, chunk_grid).astype(jnp.float32) for x, ref in zip(inputs, input_refs, strict=True))
        after, results = jax.vmap(body)(before, *matrices)
        for operand, ref, value in zip(all_outputs, (*state_refs, *output_refs), (*after, *results), strict=True):
            operand.write(ref, value)

    results = pl.pallas_call(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in all_outputs),
        grid=chunk_grid.grid,
        in_specs=[x.spec(chunk_grid) for x in all_inputs],
        out_specs=tuple(x.spec(chunk_grid) for x in all_outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=INTERPRET_PARAMS if interpreting() else False,
        name=name,
    )(*(x.array for x in all_inputs))
    return results[:num_states], results[num_states:]


def chunk_scan_saving_states(
    name: str,
    body: ChunkBody,
    chunk_grid: ChunkGrid,
    states: Sequence[Float[Array, "B H _ _"]],
    inputs: Sequence[ChunkOperand],
    output: ChunkOperand,
) -> tuple[Matrices, Array, Matrices]:
    """Run `chunk_scan` with one output, and save the states before each chunk for the backward pass.

    Args:
        name: Name of the kernel.
        body: (states, one matrix per input) -> (states, one output), all float32.
        chunk_grid: The grid.
        states: Initial states in float32.
        inputs: Input arrays.
        output: Shape, dtype and layout of the output.

    Returns:
        Final states [B, H, ...], the output, and the states before each chunk [B, H, N, ...]; states are float32.
    """

    def saving_body(states: Matrices, *inputs: Array) -> tuple[Matrices, Matrices]:
        after, out = body(states, *inputs)
        return after, (*out, *states)

    saved = [PerChunkOperand(output_shape(*x.shape[:2], chunk_grid.num_chunks, *x.shape[2:])) for x in states]
    after, (out, *before) = chunk_scan(name, saving_body, chunk_grid, states, inputs, (output, *saved))
    return after, out, tuple(before)


def vjp_body(body: ChunkBody) -> ChunkBody:
    """Return the backward body of a body with one output, to be scanned in reverse.

    Its states are the gradients of the states. Its inputs are the gradient of the output, the states before the chunk
    and the body's inputs; its outputs are the gradients of the body's inputs.
    """

    def backward_body(state_grads: Matrices, grad: Array, *residuals: Array) -> tuple[Matrices, Matrices]:
        states, inputs = residuals[: len(state_grads)], residuals[len(state_grads) :]
        _, pull = jax.vjp(body, states, *inputs)
        previous_grads, *input_grads = pull((state_grads, (grad,)))
        return previous_grads, tuple(input_grads)

    return backward_body
