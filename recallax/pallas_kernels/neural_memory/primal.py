"""The chunked memory as its equations read: a gradient matrix per token, and two associative scans over them.

An oracle beside the token loop, and what the dual form saves is measured against it: C matrices per weight and chunk
instead of none. For gradients at the chunk's start alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import Documents, accumulator
from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.neural_memory.boundary import settled
from recallax.pallas_kernels.neural_memory.inner import Fixed, Memory, Tokens, beginning
from recallax.pallas_kernels.neural_memory.learner import LOSSES, Learner


def neural_memory(
    learner: Learner, fixed: Fixed, tokens: Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "B M H D"], Memory]:
    """As `xla.neural_memory`."""
    if learner.gradient != "chunk_start":
        raise Unsupported(f"gradients are taken at {learner.gradient!r}; the primal form knows 'chunk_start' alone")
    wide = accumulator(tokens.q.dtype)
    tokens, fixed, memory = jax.tree.map(lambda x: x.astype(wide), (tokens, fixed, memory))
    per_head = jax.vmap(partial(_head, learner), in_axes=(0, 1, None, 0), out_axes=(1, 0))
    return jax.vmap(per_head, in_axes=(None, 0, 0, 0))(fixed, tokens, docs, memory)


def _head(
    learner: Learner, fixed: Fixed, tokens: Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "M D"], Memory]:
    chunk = learner.chunk

    def body(carry, part):
        memory, document = carry
        tokens, docs = part
        memory = _pick(docs.index[0] != document, beginning(fixed, memory), memory)
        new, out = _chunk(learner, fixed, memory, tokens, docs.valid)
        return (_pick(docs.valid.all(), settled(learner, fixed, memory, new), memory), docs.index[-1]), out

    parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (tokens, docs))
    (memory, _), out = jax.lax.scan(body, (memory, jnp.zeros_like(docs.index[0])), parts)
    return out.reshape(-1, out.shape[-1]), memory


def _chunk(
    learner: Learner, fixed: Fixed, memory: Memory, tokens: Tokens, valid: Bool[Array, " C"]
) -> tuple[Memory, Float[Array, "C D"]]:
    loss, names = LOSSES[learner.loss], list(memory.change)
    origin = {name: fixed.weights[name] for name in names}

    def net(weights, x):
        everything = fixed.weights | weights
        return learner.network.apply(lambda name, x: x @ everything[name], x[None], fixed.gain, fixed.offset)[0]

    start = {name: origin[name] + memory.change[name] for name in names}
    slopes = jax.vmap(jax.grad(lambda w, k, v: loss(net(w, k), v)), in_axes=(None, 0, 0))(start, tokens.k, tokens.v)
    at_token, held, pushed = {}, {}, {}
    for i, name in enumerate(names):
        away = (
            origin[name] if learner.decay_to == "zero" else jnp.zeros_like(origin[name])
        )  # from where forgetting ends
        lr = jnp.where(valid, tokens.lr[:, i], 0)[:, None, None]
        momentum, keep = (jnp.where(valid, jnp.exp(x[:, i]), 1) for x in (tokens.log_momentum, tokens.log_keep))
        step = -lr * slopes[name]
        if learner.momentum:
            step = _scan(momentum, step, memory.momentum[name])
            pushed[name] = step[-1]
        steps = jnp.where(valid[:, None, None], step, 0)
        if learner.step == "mean":
            count = jnp.maximum(jnp.cumsum(valid), 1).astype(step.dtype)[:, None, None]
            left = _scan(keep, jnp.zeros_like(steps), memory.change[name] + away)
            change = left + _scan(keep, steps, jnp.zeros_like(away)) / count - away[None]
        else:
            change = _scan(keep, steps, memory.change[name] + away) - away[None]
        at_token[name], held[name] = origin[name][None] + change, change[-1]
    out = jax.vmap(net)(at_token, tokens.q) if learner.readout == "dual" else jax.vmap(net, (None, 0))(start, tokens.q)
    return Memory(held, pushed), out


def _scan(factor: Float[Array, " C"], x: Float[Array, "C I O"], first: Float[Array, "I O"]) -> Float[Array, "C I O"]:
    """h_t = factor_t h_{t-1} + x_t from h_0 = first."""

    def combine(a, b):
        return a[0] * b[0], b[0][:, None, None] * a[1] + b[1]

    factors, sums = jax.lax.associative_scan(combine, (factor, x))
    return factors[:, None, None] * first[None] + sums


def _pick(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
