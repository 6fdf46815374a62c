"""Backward pass of the delta rule with a decay per token: a loop backward in time, then the gradients of each chunk."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_grads import delta_chunk_grads
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import (
    ResidualRefs,
    chunk_states_shape,
    delta_backward_loop,
)
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_sequence_splits import backward_split_grads, merge_residuals
from recallax.pallas_kernels.delta_rule.mosaic_gpu.forward import (
    DeltaResiduals,
    DeltaRuleInputs,
    DeltaTokens,
    gates_and_erase,
    split_gates_and,
)
from recallax.pallas_kernels.mosaic_gpu.chunk_grads import ChunkGradInputs
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import chunkwise_decay_grad
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import sum_shared_heads
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import split_rows, split_rows_head_major
from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import StateLoopConfig
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK


def delta_rule_bwd(config: LaunchConfig, residuals: DeltaResiduals, output_grads):
    """Return the gradients of the inputs, from those of the output and the final state."""
    (inputs, document_ids, *_), (out_grad, state_grad) = residuals, output_grads
    gates, erase = gates_and_erase(inputs, document_ids)
    write_grad, state_grads, dstate = _loop_backward(config, residuals, gates, out_grad, state_grad)
    values, states = (out_grad, residuals.v_new, write_grad), (residuals.states, state_grads)
    grad_inputs = ChunkGradInputs(inputs.q, inputs.k, values, states, (*(gates or ()), erase))
    grads = delta_chunk_grads(grad_inputs, config.scale)
    dq, dk = sum_shared_heads(grads.q, inputs.q), sum_shared_heads(grads.k, inputs.q)
    dv, dwrite = written_value_grads(write_grad, inputs.v, inputs.write)
    ddecay = None
    if inputs.log2_decay is not None:
        at_end = grads.decay_at_chunk_end
        at_end = jnp.sum(at_end.reshape(*at_end.shape[:3], -1, CHUNK), axis=(2, 4))
        ddecay = chunkwise_decay_grad(jnp.sum(grads.decay_in_chunk, axis=2), at_end, document_ids)
    derase = jnp.moveaxis(jnp.sum(grads.erase, axis=2), 1, 2)
    return DeltaRuleInputs(dq, dk, dv, derase, dwrite, ddecay, dstate), None


def written_value_grads(write_grad, v, write):
    """Return the gradients of v and of the write strengths, from the gradient [B, T, H, V] of their product."""
    write_grad = write_grad.astype(jnp.float32)
    dv = (write_grad * write[..., None]).astype(v.dtype)
    return dv, jnp.sum(write_grad * v.astype(jnp.float32), axis=3)


def _loop_backward(config, residuals: DeltaResiduals, gates, out_grad, state_grad):
    """Return the gradients of w V, of the states after the chunks, and of the initial state."""
    n, (q, k, *_) = config.num_splits, residuals.inputs
    q, k, out_grad = split_rows(q, n), split_rows(k, n), split_rows(out_grad, n)
    inverse = split_rows_head_major(residuals.inverse, n)
    gates, (erase,) = split_gates_and(gates, residuals.inputs.erase, num_splits=n)
    tokens = DeltaTokens(q, k, out_grad, inverse, gates, erase, ())
    launch = functools.partial(_launch_backward, tokens, config.scale)
    final_grads = backward_split_grads(lambda grad: launch(grad)[2], residuals.transitions, state_grad)
    write_grad, state_grads, initial_grads = launch(final_grads)
    return *merge_residuals((write_grad, state_grads), n), initial_grads[::n]


def _launch_backward(tokens: DeltaTokens, scale, state_grad):
    """Run `delta_backward_loop` on all rows and heads."""
    (rows, length, heads, v_dim), k_dim = tokens.values.shape, tokens.q.shape[3]
    config = StateLoopConfig(length, k_dim, v_dim, scale)

    def backward(tokens, final_grad, write_grad, state_grads, initial_grad):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        matrices, vectors = tokens.of_head(row, head)
        residuals = ResidualRefs(write_grad.at[row, :, head], state_grads.at[row, head])
        final_grad, initial_grad = final_grad.at[row, head], initial_grad.at[row, head]
        delta_backward_loop(config, matrices, vectors, final_grad, initial_grad, residuals)

    return launch_kernel(
        backward,
        out_type=(
            jax.ShapeDtypeStruct(tokens.values.shape, tokens.values.dtype),
            chunk_states_shape(rows, heads, length, k_dim, v_dim),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
        ),
        grid={"row": rows, "head": heads},
        num_consumer_wgs=config.num_consumer_wgs,
    )(tokens, state_grad)
