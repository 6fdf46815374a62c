"""The definition of a memory that learns while it reads: one token after another, gradients by `jax.grad`."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import Documents, accumulator
from recallax.pallas_kernels.neural_memory.boundary import settled
from recallax.pallas_kernels.neural_memory.inner import Fixed, Memory, Tokens, beginning
from recallax.pallas_kernels.neural_memory.learner import LOSSES, Learner


def neural_memory(
    learner: Learner, fixed: Fixed, tokens: Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "B M H D"], Memory]:
    """As `xla.neural_memory`. Per token: learn from it (at the weights that `gradient` names), then read."""
    wide = accumulator(tokens.q.dtype)
    tokens, fixed, memory = jax.tree.map(lambda x: x.astype(wide), (tokens, fixed, memory))
    per_head = jax.vmap(partial(_head, learner), in_axes=(0, 1, None, 0), out_axes=(1, 0))
    return jax.vmap(per_head, in_axes=(None, 0, 0, 0))(fixed, tokens, docs, memory)


def _head(
    learner: Learner, fixed: Fixed, tokens: Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "M D"], Memory]:
    loss, network = LOSSES[learner.loss], learner.network
    origin = {name: fixed.weights[name] for name in memory.change}
    blank, nothing = beginning(fixed, memory), jax.tree.map(jnp.zeros_like, memory.change)

    def net(change, x):
        everything = fixed.weights | {name: origin[name] + x for name, x in change.items()}
        return network.apply(lambda name, x: x @ everything[name], x[None], fixed.gain, fixed.offset)[0]

    def step(carry, token):
        memory, chunk, total, written, document = carry
        (q, k, v, *gates), index, valid, place = token
        lr, momentum, keep = gates[0], jnp.exp(gates[1]), jnp.exp(gates[2])
        # A chunk ends, and what it changed is settled, if all of its tokens were there.
        after = settled(learner, fixed, chunk, memory)
        memory = _pick(place == 0, _pick(written == learner.chunk, after, chunk), memory)
        memory = _pick(index != document, blank, memory)
        begins = (place == 0) | (index != document)
        chunk, written = _pick(begins, memory, chunk), jnp.where(begins, 0, written)
        total = _pick(begins, (memory.change, nothing), total)

        def decayed(change):
            away = {n: origin[n] if learner.decay_to == "zero" else 0 for n in change}  # from where forgetting ends
            return {n: keep[i] * (x + away[n]) - away[n] for i, (n, x) in enumerate(change.items())}

        at = {"chunk_start": chunk.change, "token": memory.change, "token_decayed": decayed(memory.change)}
        slopes = jax.grad(lambda w: loss(net(w, k), v))(at[learner.gradient])
        held = {n: momentum[i] * s for i, (n, s) in enumerate(memory.momentum.items())}
        surprise = {n: held.get(n, 0) - lr[i] * slopes[n] for i, n in enumerate(memory.change)}
        change = {n: x + surprise[n] for n, x in decayed(memory.change).items()}
        # What the chunk began with, decayed, and the decayed sum of the chunk's steps.
        left = decayed(total[0])
        sums = {n: keep[i] * x + surprise[n] for i, (n, x) in enumerate(total[1].items())}
        total = _pick(valid, (left, sums), total)
        if learner.step == "mean":
            change = {n: left[n] + sums[n] / (written + 1).astype(sums[n].dtype) for n in change}
        memory = _pick(valid, Memory(change, surprise if learner.momentum else {}), memory)
        read = net(memory.change if learner.readout == "dual" else chunk.change, q)
        return (memory, chunk, total, written + valid.astype(jnp.int32), index), read

    length = docs.index.shape[0]
    place = jnp.arange(length, dtype=jnp.int32) % learner.chunk
    if learner.gradient != "chunk_start":
        place = jnp.ones_like(place)  # without chunks
    zero = jnp.zeros((), jnp.int32)
    first = (memory, memory, (memory.change, nothing), zero, zero)
    (memory, chunk, _, written, _), out = jax.lax.scan(step, first, (tuple(tokens), *docs, place))
    if learner.gradient != "chunk_start":
        return out, memory
    return out, _pick(written == learner.chunk, settled(learner, fixed, chunk, memory), chunk)


def _pick(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
