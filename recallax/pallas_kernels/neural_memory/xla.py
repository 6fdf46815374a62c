"""Neural memory in XLA: chunks in the dual form, without a gradient matrix per token.

With X the inputs of a weight matrix and U the gradients of its outputs, both of all tokens of a chunk, token s has the
gradient x_s u_s^T. So a product with the weights of token t needs only products of vectors:

    z W_t = beta_t z W' + f_t z S' - sum_s G_ts (z . x_s) u_s

For any network, U is computed by one backward pass at the weights of the start of the chunk. A scan over chunks carries
the weights. For the linear memory with gradients per token, U solves a triangular system instead:
u_s = k_s W_{s-1} - v_s, in which W_{s-1} is the same sum.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, chunk_masks
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.neural_memory.apply_boundary import apply_boundary
from recallax.pallas_kernels.neural_memory.inner_optimizer import LOSSES, InnerOptimizer, Weights
from recallax.pallas_kernels.neural_memory.reference import NeuralMemoryArgs
from recallax.pallas_kernels.neural_memory.sequential_memory import shifted_coefficients
from recallax.pallas_kernels.neural_memory.update_coefficients import (
    FastWeights,
    MemoryInputs,
    OuterParams,
    UpdateCoefficients,
    initial_memory,
    update_coefficients,
)
from recallax.pallas_kernels.triangular import unit_lower_inverse


def neural_memory(args: NeuralMemoryArgs) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """Compute the neural memory in chunks.

    The arguments and the result are those of `neural_memory.reference.neural_memory`.
    """
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    b, length = document_ids.index.shape
    chunk = inner_optimizer.chunk_size

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, length // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint  # save the weights between chunks for the backward pass, not the values within a chunk
    def body(
        carry: tuple[FastWeights, Array], part: tuple[MemoryInputs, DocumentIds]
    ) -> tuple[tuple[FastWeights, Array], Array]:
        memory, document = carry
        tokens, docs = part
        update = _chunk if inner_optimizer.gradient == "chunk_start" else _sequential_chunk
        memory, out = update(NeuralMemoryArgs(inner_optimizer, outer_params, tokens, docs, memory), document)
        return (memory, docs.index[:, -1]), out

    parts = jax.tree.map(cut, (tokens, document_ids))
    (fast_weights, _), out = jax.lax.scan(body, (fast_weights, jnp.zeros_like(document_ids.index[:, 0])), parts)
    return jnp.moveaxis(out, 0, 1).reshape(b, length, *out.shape[3:]), fast_weights


def _chunk(args: NeuralMemoryArgs, state_document: Int[Array, " B"]) -> tuple[FastWeights, Float[Array, "B C H D"]]:
    """Update with gradients at the start of the chunk.

    Documents start with chunks, and incomplete chunks do not change the memory.

    Args:
        args: Tokens and documents of the chunk, and the memory before it.
        state_document: Index of the document that the memory belongs to.
    """
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    resets = document_ids.index[:, 0] != state_document
    fast_weights = _where_rows(resets, initial_memory(outer_params, fast_weights), fast_weights)
    coefficients = update_coefficients(
        inner_optimizer, tokens, chunk_masks(document_ids, document_ids.index[:, 0]).visible
    )
    one_head = partial(_update_one_head, inner_optimizer)
    per_head = jax.vmap(one_head, in_axes=(0, 0, 1, 0), out_axes=(0, 1))
    new, out = jax.vmap(per_head, in_axes=(None, 0, 0, 0))(outer_params, fast_weights, tokens, coefficients)
    new = jax.vmap(jax.vmap(partial(apply_boundary, inner_optimizer)), in_axes=(None, 0, 0))(
        outer_params, fast_weights, new
    )
    return _where_rows(document_ids.valid.all(axis=1), new, fast_weights), out


def _update_one_head(
    inner_optimizer: InnerOptimizer,
    outer_params: OuterParams,
    fast_weights: FastWeights,
    tokens: MemoryInputs,
    coefficients: UpdateCoefficients,
) -> tuple[FastWeights, Float[Array, "C D"]]:
    """Update the memory of one head with one chunk, and read it."""
    q, k, v = tokens[:3]
    dtype, apply, loss = q.dtype, inner_optimizer.network.apply, LOSSES[inner_optimizer.loss]
    norm_scale, norm_bias = outer_params.norm_scale.astype(jnp.float32), outer_params.norm_bias.astype(jnp.float32)
    origin = {name: x.astype(jnp.float32) for name, x in outer_params.initial_weights.items()}
    start = origin | {name: origin[name] + x for name, x in fast_weights.delta.items()}
    index = {name: i for i, name in enumerate(inner_optimizer.gate_names)}

    def times(x: Array, weight: Array) -> Array:
        return einsum_f32("ci,io->co", x.astype(dtype), weight.astype(dtype))

    def losses(shifts: Weights) -> tuple[Array, Weights]:
        inputs: Weights = {}

        def through(name: str, x: Array) -> Array:
            inputs[name] = x
            out = times(x, start[name])
            return out + shifts[name] if name in shifts else out

        predictions = apply(through, k.astype(jnp.float32), norm_scale, norm_bias)
        return jnp.sum(jax.vmap(loss)(predictions, v.astype(jnp.float32))), inputs

    shifts = {name: jnp.zeros((k.shape[0], w.shape[1]), jnp.float32) for name, w in fast_weights.delta.items()}
    grads, inputs = jax.grad(losses, has_aux=True)(shifts)

    def at_token(name: str, x: Array) -> Array:
        if name not in index:
            return times(x, start[name])
        beta, f, g = (part[index[name]] for part in coefficients[:3])
        read = beta[:, None] * times(x, fast_weights.delta[name])
        if inner_optimizer.momentum:
            read += f[:, None] * times(x, fast_weights.momentum[name])
        read += times(x, origin[name]) * (beta[:, None] if inner_optimizer.decay_to == "zero" else 1)
        similarity = einsum_f32("ti,si->ts", x.astype(dtype), inputs[name].astype(dtype)) * g
        return read - einsum_f32("ts,so->to", similarity.astype(dtype), grads[name].astype(dtype))

    new: tuple[Weights, Weights] = {}, {}
    for name, i in index.items():
        x, u = inputs[name].astype(dtype), grads[name]
        # The coefficients scale the gradients of the outputs, one scalar per token.
        write = einsum_f32("si,so->io", x, (coefficients.gradients[i, -1][:, None] * u).astype(dtype))
        beta = coefficients.initial_weights[i, -1]
        kept = beta * fast_weights.delta[name]
        kept = kept - (1 - beta) * origin[name] if inner_optimizer.decay_to == "zero" else kept
        if inner_optimizer.momentum:
            kept += coefficients.initial_momentum[i, -1] * fast_weights.momentum[name]
            push = einsum_f32("si,so->io", x, (coefficients.final_gradients[i][:, None] * u).astype(dtype))
            new[1][name] = coefficients.final_momentum[i] * fast_weights.momentum[name] - push
        new[0][name] = kept - write
    reads = at_token if inner_optimizer.readout == "dual" else lambda name, x: times(x, start[name])
    return FastWeights(*new), apply(reads, q.astype(jnp.float32), norm_scale, norm_bias).astype(dtype)


def _sequential_chunk(
    args: NeuralMemoryArgs, state_document: Int[Array, " B"]
) -> tuple[FastWeights, Float[Array, "B C H D"]]:
    """Update the linear memory with gradients per token; documents may start anywhere, arguments as in `_chunk`."""
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    masks = chunk_masks(document_ids, state_document)
    coefficients = jax.tree.map(lambda x: x[:, :, 0], update_coefficients(inner_optimizer, tokens, masks.visible))
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in tokens[:3])
    dtype, (name,) = q.dtype, fast_weights.delta
    origin, to_zero = outer_params.initial_weights[name].astype(jnp.float32), inner_optimizer.decay_to == "zero"
    in_state_document = masks.in_state_document[:, None, :, None]
    beta, f = coefficients.initial_weights[..., None], coefficients.initial_momentum[..., None]

    def times_initial(x: Array, carried: Weights, initial: Weights | None) -> Array:
        """Multiply x by the initial matrix of each token's document: the carried one, or that of a new document."""
        first = 0.0 if initial is None else einsum_f32("bhci,hio->bhco", x, initial[name].astype(dtype))
        return jnp.where(in_state_document, einsum_f32("bhci,bhio->bhco", x, carried[name].astype(dtype)), first)

    start = (None, None) if outer_params.initial_fast_weights is None else outer_params.initial_fast_weights

    def carried(x: Array, beta: Array, f: Array) -> Array:
        """Multiply x by the terms of each token's weights that do not depend on the chunk's gradients."""
        new = einsum_f32("bhci,hio->bhco", x, origin.astype(dtype)) * (beta if to_zero else 1)
        new += beta * times_initial(x, fast_weights.delta, start[0])
        return new + f * times_initial(x, fast_weights.momentum, start[1]) if inner_optimizer.momentum else new

    beta_before, f_before, g = shifted_coefficients(inner_optimizer, tokens, coefficients, masks.visible)
    beta_before, f_before = beta_before[..., None], f_before[..., None]
    similarity = einsum_f32("bhti,bhsi->bhts", k, k)
    inverse = unit_lower_inverse(g * similarity)
    residual = carried(k, beta_before, f_before) - v.astype(jnp.float32)
    grads = einsum_f32("bhts,bhso->bhto", inverse, residual).astype(dtype)
    scores = einsum_f32("bhti,bhsi->bhts", q, k) * coefficients.gradients
    out = carried(q, beta, f) - einsum_f32("bhts,bhso->bhto", scores.astype(dtype), grads)
    last = _where_rows(masks.keeps_state, fast_weights, initial_memory(outer_params, fast_weights))
    last_beta, last_f = beta[:, :, -1:], f[:, :, -1:]
    kept = last_beta * last.delta[name]
    kept = kept - (1 - last_beta) * origin[None] if to_zero else kept
    momentum: Weights = {}
    if inner_optimizer.momentum:
        kept += last_f * last.momentum[name]
        push = einsum_f32("bhsi,bhso->bhio", _scale_tokens(k, coefficients.final_gradients), grads)
        momentum = {name: coefficients.final_momentum[..., None, None] * last.momentum[name] - push}
    write = einsum_f32("bhsi,bhso->bhio", _scale_tokens(k, coefficients.gradients[..., -1, :]), grads)
    return FastWeights({name: kept - write}, momentum), jnp.moveaxis(out, 1, 2).astype(dtype)


def _scale_tokens(x: Float[Array, "B H C I"], weight: Float[Array, "B H C"]) -> Array:
    return (x.astype(jnp.float32) * weight[..., None]).astype(x.dtype)


def _where_rows(rows: Bool[Array, " B"], new: FastWeights, old: FastWeights) -> FastWeights:
    return jax.tree.map(lambda a, b: jnp.where(rows[:, None, None, None], a, b), new, old)
