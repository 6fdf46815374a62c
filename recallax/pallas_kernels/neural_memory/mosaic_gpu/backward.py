"""Backward pass of the linear memory: a loop backward in time, then the gradients of each chunk."""

import jax

from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import WG_COLUMNS, StateLoopConfig
from recallax.pallas_kernels.neural_memory.mosaic_gpu.forward import (
    UNIT_SCALE,
    LinearMemoryInputs,
    LinearMemoryResiduals,
    MemoryTokens,
    block_position,
    chunk_states_shapes,
    float32_shapes,
)
from recallax.pallas_kernels.neural_memory.mosaic_gpu.memory_chunk_grads import memory_chunk_grads
from recallax.pallas_kernels.neural_memory.mosaic_gpu.memory_chunk_loops import (
    MemoryResidualRefs,
    memory_backward_loop,
)


def linear_memory_bwd(config: LaunchConfig, residuals: LinearMemoryResiduals, output_grads):
    """Return the gradients of the inputs, from those of the output and the final states."""
    out_grad, final_state_grads = output_grads
    q, k, _, coefficients, _ = residuals.inputs
    dv, chunk_state_grads, dstates = _launch_backward(residuals, out_grad, final_state_grads)
    values, states = (out_grad, residuals.updates, dv), (residuals.states, chunk_state_grads)
    dq, dk, dcoefficients = memory_chunk_grads(q, k, values, states, coefficients)
    return (LinearMemoryInputs(dq, dk, dv, dcoefficients, dstates),)


def _launch_backward(residuals: LinearMemoryResiduals, out_grad, state_grads):
    """Return the gradients of V, of the states after the chunks, and of the initial states."""
    q, k, v, coefficients, _ = residuals.inputs
    b, t, h, v_dim = v.shape
    config = StateLoopConfig(t, q.shape[3], WG_COLUMNS, UNIT_SCALE)

    def unlearn(tokens, final_grads, v_grad, chunk_state_grads, initial_grads):
        row, head, columns = block_position()
        matrices, vectors = tokens.of_block()
        final_grads, initial_grads = (
            [x.at[row, head, :, columns] for x in refs] for refs in (final_grads, initial_grads)
        )
        saved_states = [x.at[row, head, :, :, columns] for x in chunk_state_grads]
        saved = MemoryResidualRefs(v_grad.at[row, :, head, columns], saved_states)
        memory_backward_loop(config, matrices, vectors, final_grads, initial_grads, saved)

    tokens = MemoryTokens(q, k, out_grad, residuals.scores, residuals.inverse, coefficients.vectors())
    return launch_kernel(
        unlearn,
        out_type=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            chunk_states_shapes(state_grads, t),
            float32_shapes(state_grads),
        ),
        grid={"row": b, "head": h, "part": v_dim // WG_COLUMNS},
        num_consumer_wgs=1,
    )(tokens, state_grads)
