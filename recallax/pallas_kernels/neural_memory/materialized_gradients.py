"""Chunked memory with materialised gradients: one gradient matrix per token, and two associative scans over them.

It is a second oracle besides the token loop, and the baseline for the dual form: it needs C gradient matrices per
weight and chunk where the dual form needs none. It supports gradients at the start of the chunk only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.neural_memory.apply_boundary import apply_boundary
from recallax.pallas_kernels.neural_memory.inner_optimizer import LOSSES, InnerOptimizer
from recallax.pallas_kernels.neural_memory.reference import NeuralMemoryArgs, map_heads
from recallax.pallas_kernels.neural_memory.update_coefficients import (
    FastWeights,
    MemoryInputs,
    OuterParams,
    initial_memory,
)


def neural_memory(args: NeuralMemoryArgs) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """Compute the neural memory with one gradient matrix per token.

    The arguments and the result are those of `neural_memory.reference.neural_memory`.

    Raises:
        Unsupported: Gradients are computed per token.
    """
    gradient = args.inner_optimizer.gradient
    if gradient != "chunk_start":
        raise Unsupported(f"gradient is {gradient!r}; the implementation 'materialized' supports 'chunk_start' only")
    return map_heads(_one_head, args)


def _one_head(args: NeuralMemoryArgs) -> tuple[Float[Array, "M D"], FastWeights]:
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    chunk = inner_optimizer.chunk_size

    def body(carry, part):
        memory, document = carry
        tokens, docs = part
        memory = _select(docs.index[0] != document, initial_memory(outer_params, memory), memory)
        new, out = _chunk(inner_optimizer, outer_params, memory, tokens, docs.valid)
        return (
            _select(docs.valid.all(), apply_boundary(inner_optimizer, outer_params, memory, new), memory),
            docs.index[-1],
        ), out

    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (tokens, document_ids))
    (fast_weights, _), out = jax.lax.scan(body, (fast_weights, jnp.zeros_like(document_ids.index[0])), parts)
    return out.reshape(-1, out.shape[-1]), fast_weights


def _chunk(
    inner_optimizer: InnerOptimizer,
    outer_params: OuterParams,
    fast_weights: FastWeights,
    tokens: MemoryInputs,
    valid: Bool[Array, " C"],
) -> tuple[FastWeights, Float[Array, "C D"]]:
    loss, names = LOSSES[inner_optimizer.loss], inner_optimizer.gate_names
    origin = {name: outer_params.initial_weights[name] for name in names}

    def net(weights, x):
        everything = outer_params.initial_weights | weights
        return inner_optimizer.network.apply(
            lambda name, x: x @ everything[name], x[None], outer_params.norm_scale, outer_params.norm_bias
        )[0]

    start = {name: origin[name] + fast_weights.delta[name] for name in names}
    grads = jax.vmap(jax.grad(lambda w, k, v: loss(net(w, k), v)), in_axes=(None, 0, 0))(start, tokens.k, tokens.v)
    at_token, delta, momenta = {}, {}, {}
    for i, name in enumerate(names):
        # Decay acts on the difference from its target: W itself, or W minus the initial weights.
        offset = origin[name] if inner_optimizer.decay_to == "zero" else jnp.zeros_like(origin[name])
        lr = jnp.where(valid, tokens.lr[:, i], 0)[:, None, None]
        momentum, keep = (jnp.where(valid, jnp.exp(x[:, i]), 1) for x in (tokens.log_momentum, tokens.log_decay))
        step = -lr * grads[name]
        if inner_optimizer.momentum:
            step = _linear_recurrence(momentum, step, fast_weights.momentum[name])
            momenta[name] = step[-1]
        steps = jnp.where(valid[:, None, None], step, 0)
        if inner_optimizer.gradient_reduction == "mean":
            count = jnp.maximum(jnp.cumsum(valid), 1).astype(step.dtype)[:, None, None]
            decayed = _linear_recurrence(keep, jnp.zeros_like(steps), fast_weights.delta[name] + offset)
            change = decayed + _linear_recurrence(keep, steps, jnp.zeros_like(offset)) / count - offset[None]
        else:
            change = _linear_recurrence(keep, steps, fast_weights.delta[name] + offset) - offset[None]
        at_token[name], delta[name] = origin[name][None] + change, change[-1]
    out = (
        jax.vmap(net)(at_token, tokens.q)
        if inner_optimizer.readout == "dual"
        else jax.vmap(net, (None, 0))(start, tokens.q)
    )
    return FastWeights(delta, momenta), out


def _linear_recurrence(
    factor: Float[Array, " C"], x: Float[Array, "C I O"], first: Float[Array, "I O"]
) -> Float[Array, "C I O"]:
    """Return h_t = factor_t h_{t-1} + x_t with h_0 = first, for every t."""

    def combine(a, b):
        return a[0] * b[0], b[0][:, None, None] * a[1] + b[1]

    factors, sums = jax.lax.associative_scan(combine, (factor, x))
    return factors[:, None, None] * first[None] + sums


def _select(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
