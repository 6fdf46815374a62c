"""The linear memory with a gradient per token on Hopper: the delta rule's method, with weights and momentum as states.

    U = T (V - a_0 K W - a_1 K S),   T = (I + G- * K K^T)^{-1}          minus the gradients of the memory's loss

The coefficients of gradients and states (G, a, b, c) depend on gates and documents alone. XLA computes them first, and
also what the initial weights add (`sequential_memory.py`). A kernel then computes the scores and inverses of all
chunks, and another loops over time with both states in registers (`memory_chunk_loops.py`). For the gradients that loop
also stores U and the states before each chunk; a loop backward in time gives the gradients of V and of the states
after each chunk, and a last kernel computes the other gradients of each chunk (`memory_chunk_grads.py`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, chunk_masks
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import SUPPORTED_HEAD_DIMS, require_bfloat16
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.mosaic_gpu.backward import linear_memory_bwd
from recallax.pallas_kernels.neural_memory.mosaic_gpu.forward import (
    LinearMemoryInputs,
    linear_memory_fwd,
    linear_memory_primal,
)
from recallax.pallas_kernels.neural_memory.mosaic_gpu.memory_chunk_loops import ChunkCoefficients, StateCoefficients
from recallax.pallas_kernels.neural_memory.reference import NeuralMemoryArgs
from recallax.pallas_kernels.neural_memory.sequential_memory import (
    require_sequential,
    shifted_coefficients,
    subtract_initial_weights,
)
from recallax.pallas_kernels.neural_memory.update_coefficients import (
    FastWeights,
    MemoryInputs,
    pad_to_chunks,
    update_coefficients,
)

_linear_memory = kernel_custom_vjp(linear_memory_primal, linear_memory_fwd, linear_memory_bwd)


def neural_memory(args: NeuralMemoryArgs) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """Compute the linear memory with a gradient per token on Hopper.

    The arguments and the result are those of `neural_memory.reference.neural_memory`.

    Raises:
        Unsupported: If the inner optimizer, a width or a dtype is not supported, or if there is neither a GPU nor
            `interpret_kernels()`.
    """
    inner_optimizer, outer_params, tokens, document_ids, memory = args
    require_sequential(inner_optimizer, outer_params)
    interpret = use_interpreter("gpu")
    if tokens.q.shape[3] not in SUPPORTED_HEAD_DIMS:
        raise Unsupported(f"the memory is {tokens.q.shape[3]} wide; it must be one of {SUPPORTED_HEAD_DIMS}")
    require_bfloat16(q=tokens.q, k=tokens.k, v=tokens.v)
    (name,), length = memory.delta, tokens.q.shape[1]
    tokens, document_ids = pad_to_chunks(tokens, document_ids, CHUNK)
    q, k, v = tokens[:3]
    log_decay = jnp.where(document_ids.valid[..., None, None], tokens.log_decay.astype(jnp.float32), 0)
    document_starts = document_ids.index != jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    initial_weights = outer_params.initial_weights[name].astype(jnp.float32)
    v, initial_out, initial_delta = subtract_initial_weights(
        inner_optimizer, initial_weights, q, k, v, log_decay, document_starts
    )
    states = (memory.delta[name], *memory.momentum.values())
    # The coefficients are recomputed in the backward pass: they are [B, H, T, C], larger than their inputs.
    coefficients = jax.checkpoint(functools.partial(_chunk_coefficients, inner_optimizer))(tokens, document_ids)
    inputs = LinearMemoryInputs(q, k, v, coefficients, states)
    out, final_states = _linear_memory(LaunchConfig(1.0, 1, interpret), inputs)
    momentum = {name: final_states[1]} if inner_optimizer.momentum else {}
    fast_weights = FastWeights({name: final_states[0] + initial_delta}, momentum)
    return (out.astype(jnp.float32) + initial_out).astype(q.dtype)[:, :length], fast_weights


def _chunk_coefficients(
    inner_optimizer: InnerOptimizer, tokens: MemoryInputs, document_ids: DocumentIds
) -> ChunkCoefficients:
    """Compute the coefficients of all chunks."""
    b, t, h, _ = tokens.lr.shape
    tokens, parts = jax.tree.map(lambda x: x.reshape(-1, CHUNK, *x.shape[2:]), (tokens, document_ids))
    previous = jnp.pad(document_ids.index[:, CHUNK - 1 : -1 : CHUNK], ((0, 0), (1, 0)))
    masks = chunk_masks(parts, previous.reshape(-1))
    coefficients = jax.tree.map(lambda x: x[:, :, 0], update_coefficients(inner_optimizer, tokens, masks.visible))
    weights_to_key, momentum_to_key, gradients_to_key = shifted_coefficients(
        inner_optimizer, tokens, coefficients, masks.visible
    )
    in_document = masks.in_state_document[:, None].astype(jnp.float32)

    def merge_chunks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, -1, *x.shape[1:]), 1, 2).reshape(b, h, t, *x.shape[3:])

    def per_state(weights: Array, momentum: Array) -> StateCoefficients:
        return tuple(merge_chunks(x) for x in ((weights, momentum) if inner_optimizer.momentum else (weights,)))

    momentum_decay = ()
    update_to_query, update_to_key = merge_chunks(coefficients.gradients), merge_chunks(gradients_to_key)
    state_to_key = per_state(in_document * weights_to_key, in_document * momentum_to_key)
    state_to_query = per_state(in_document * coefficients.initial_weights, in_document * coefficients.initial_momentum)
    update_to_end = per_state(coefficients.gradients[:, :, -1], coefficients.final_gradients)
    if inner_optimizer.momentum:
        momentum_decay = (merge_chunks(coefficients.final_momentum[..., None] * in_document),)
    return ChunkCoefficients(
        update_to_query, update_to_key, state_to_key, state_to_query, update_to_end, momentum_decay
    )
