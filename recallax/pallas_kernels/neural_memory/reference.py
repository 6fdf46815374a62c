"""Definition of the neural memory: a scan over tokens with gradients by `jax.grad`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype
from recallax.pallas_kernels.neural_memory.apply_boundary import apply_boundary
from recallax.pallas_kernels.neural_memory.inner_optimizer import LOSSES, InnerOptimizer
from recallax.pallas_kernels.neural_memory.update_coefficients import (
    FastWeights,
    MemoryInputs,
    OuterParams,
    initial_memory,
)


class NeuralMemoryArgs(NamedTuple):
    """Checked arguments of an implementation of `neural_memory`."""

    inner_optimizer: InnerOptimizer
    outer_params: OuterParams
    tokens: MemoryInputs
    """Tokens [B, M, H, ...] of whole chunks."""
    document_ids: DocumentIds
    fast_weights: FastWeights
    """Memory before the first token."""


def neural_memory(args: NeuralMemoryArgs) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """Compute the neural memory token by token: update the weights with the token, then read them.

    Returns:
        Output of each token, and the memory of the last document after its last whole chunk (after its last token with
        gradients per token).
    """
    return map_heads(_one_head, args)


def map_heads[Out](one_head: Callable[[NeuralMemoryArgs], Out], args: NeuralMemoryArgs) -> Out:
    """Compute every head of every row by itself, in float32 or wider.

    Args:
        one_head: Function of the arguments of one head of one row, without the axes B and H.
        args: Arguments of all rows and heads.

    Returns:
        The outputs [B, M, H, ...] and fast weights [B, H, ...] of `one_head`.
    """
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    dtype = accumulator_dtype(tokens.q.dtype)
    tokens, outer_params, fast_weights = jax.tree.map(lambda x: x.astype(dtype), (tokens, outer_params, fast_weights))

    def call(*arrays: Any) -> Out:
        return one_head(NeuralMemoryArgs(inner_optimizer, *arrays))

    per_head = jax.vmap(call, in_axes=(0, 1, None, 0), out_axes=(1, 0))
    return jax.vmap(per_head, in_axes=(None, 0, 0, 0))(outer_params, tokens, document_ids, fast_weights)


def _one_head(args: NeuralMemoryArgs) -> tuple[Float[Array, "M D"], FastWeights]:
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    loss, network = LOSSES[inner_optimizer.loss], inner_optimizer.network
    gates = list(enumerate(inner_optimizer.gate_names))
    origin = {name: outer_params.initial_weights[name] for name in fast_weights.delta}
    initial, zeros = initial_memory(outer_params, fast_weights), jax.tree.map(jnp.zeros_like, fast_weights.delta)

    def net(change, x):
        everything = outer_params.initial_weights | {name: origin[name] + x for name, x in change.items()}
        return network.apply(
            lambda name, x: x @ everything[name], x[None], outer_params.norm_scale, outer_params.norm_bias
        )[0]

    def step(carry, token):
        memory, chunk, total, written, document = carry
        (q, k, v, lr, log_momentum, log_decay), index, valid, place = token
        momentum, keep = jnp.exp(log_momentum), jnp.exp(log_decay)
        # The boundary rule applies after a chunk if all of its tokens were valid.
        after = apply_boundary(inner_optimizer, outer_params, chunk, memory)
        memory = _select(place == 0, _select(written == inner_optimizer.chunk_size, after, chunk), memory)
        memory = _select(index != document, initial, memory)
        begins = (place == 0) | (index != document)
        chunk, written = _select(begins, memory, chunk), jnp.where(begins, 0, written)
        total = _select(begins, (memory.delta, zeros), total)

        def decayed(change):
            # Decay acts on the difference from its target: W itself, or W minus the initial weights.
            offset = {n: origin[n] if inner_optimizer.decay_to == "zero" else 0 for n in change}
            return {n: keep[i] * (change[n] + offset[n]) - offset[n] for i, n in gates}

        at = {"chunk_start": chunk.delta, "token": memory.delta, "token_decayed": decayed(memory.delta)}
        grads = jax.grad(lambda w: loss(net(w, k), v))(at[inner_optimizer.gradient])
        carried = {n: momentum[i] * memory.momentum[n] for i, n in gates if n in memory.momentum}
        surprise = {n: carried.get(n, 0) - lr[i] * grads[n] for i, n in gates}
        change = {n: x + surprise[n] for n, x in decayed(memory.delta).items()}
        # The decayed delta of the start of the chunk, and the decayed sum of the steps of the chunk.
        initial_part = decayed(total[0])
        sums = {n: keep[i] * total[1][n] + surprise[n] for i, n in gates}
        total = _select(valid, (initial_part, sums), total)
        if inner_optimizer.gradient_reduction == "mean":
            change = {n: initial_part[n] + sums[n] / (written + 1).astype(sums[n].dtype) for n in change}
        memory = _select(valid, FastWeights(change, surprise if inner_optimizer.momentum else {}), memory)
        read = net(memory.delta if inner_optimizer.readout == "dual" else chunk.delta, q)
        return (memory, chunk, total, written + valid.astype(jnp.int32), index), read

    length = document_ids.index.shape[0]
    place = jnp.arange(length, dtype=jnp.int32) % inner_optimizer.chunk_size
    if inner_optimizer.gradient != "chunk_start":
        place = jnp.ones_like(place)  # no chunk boundaries
    zero = jnp.zeros((), jnp.int32)
    first = (fast_weights, fast_weights, (fast_weights.delta, zeros), zero, zero)
    (fast_weights, chunk, _, written, _), out = jax.lax.scan(step, first, (tuple(tokens), *document_ids, place))
    if inner_optimizer.gradient != "chunk_start":
        return out, fast_weights
    after = apply_boundary(inner_optimizer, outer_params, chunk, fast_weights)
    return out, _select(written == inner_optimizer.chunk_size, after, chunk)


def _select(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
