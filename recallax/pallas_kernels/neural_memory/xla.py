"""A neural memory in chunks, by the dual form: no token's gradient is ever a matrix of its own.

With X the inputs of a weight matrix and U the gradients at its outputs, both of all tokens of a chunk, token s has the
gradient x_s u_s^T, so that reading through the weights of token t needs only products of vectors:

    z W_t = beta_t z W' + f_t z S' - sum_s G_ts (z . x_s) u_s

U comes from one backward pass at the chunk's first weights, for any network. Chunks follow one another in a scan that
keeps the weights between them. For the linear memory with per-token gradients U solves a triangular system instead:
u_s = k_s W_{s-1} - v_s, in which W_{s-1} is the same sum.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import Documents, masks_of
from recallax.pallas_kernels.neural_memory.boundary import settled
from recallax.pallas_kernels.neural_memory.exact import before_tokens
from recallax.pallas_kernels.neural_memory.inner import Fixed, Memory, Tokens, Weighing, beginning, weigh
from recallax.pallas_kernels.neural_memory.learner import LOSSES, Learner, Weights
from recallax.pallas_kernels.product import product
from recallax.pallas_kernels.triangular import unit_lower_inverse


def neural_memory(
    learner: Learner, fixed: Fixed, tokens: Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "B M H D"], Memory]:
    """Tokens of whole chunks; the outputs, and the memory of the last document after its last whole chunk.

    Under per-token gradients, the memory after its last token.
    """
    b, length = docs.index.shape
    chunk = learner.chunk

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, length // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint  # keep the weights between chunks for the backward, not what is computed within one
    def body(carry: tuple[Memory, Array], part: tuple[Tokens, Documents]) -> tuple[tuple[Memory, Array], Array]:
        memory, document = carry
        tokens, docs = part
        walk = _chunk if learner.gradient == "chunk_start" else _exact_chunk
        memory, out = walk(learner, fixed, memory, document, tokens, docs)
        return (memory, docs.index[:, -1]), out

    parts = jax.tree.map(cut, (tokens, docs))
    (memory, _), out = jax.lax.scan(body, (memory, jnp.zeros_like(docs.index[:, 0])), parts)
    return jnp.moveaxis(out, 0, 1).reshape(b, length, *out.shape[3:]), memory


def _chunk(
    learner: Learner, fixed: Fixed, memory: Memory, document: Int[Array, " B"], tokens: Tokens, docs: Documents
) -> tuple[Memory, Float[Array, "B C H D"]]:
    """Gradients at the chunk's first weights. Documents begin where chunks do; a chunk with a gap writes nothing."""
    fresh = docs.index[:, 0] != document
    memory = _where(fresh, beginning(fixed, memory), memory)
    weighing = weigh(learner, tokens, masks_of(docs, docs.index[:, 0]).visible)
    one_head = partial(_learn, learner)
    per_head = jax.vmap(one_head, in_axes=(0, 0, 1, 0), out_axes=(0, 1))
    new, out = jax.vmap(per_head, in_axes=(None, 0, 0, 0))(fixed, memory, tokens, weighing)
    new = jax.vmap(jax.vmap(partial(settled, learner)), in_axes=(None, 0, 0))(fixed, memory, new)
    return _where(docs.valid.all(axis=1), new, memory), out


def _learn(
    learner: Learner, fixed: Fixed, memory: Memory, tokens: Tokens, weighing: Weighing
) -> tuple[Memory, Float[Array, "C D"]]:
    """One chunk of one head."""
    q, k, v = tokens[:3]
    dtype, apply, loss = q.dtype, learner.network.apply, LOSSES[learner.loss]
    gain, offset = fixed.gain.astype(jnp.float32), fixed.offset.astype(jnp.float32)
    origin = {name: x.astype(jnp.float32) for name, x in fixed.weights.items()}
    start = origin | {name: origin[name] + x for name, x in memory.change.items()}
    index = {name: i for i, name in enumerate(memory.change)}

    def times(x: Array, weight: Array) -> Array:
        return product("ci,io->co", x.astype(dtype), weight.astype(dtype))

    def losses(shifts: Weights) -> tuple[Array, Weights]:
        inputs: Weights = {}

        def through(name: str, x: Array) -> Array:
            inputs[name] = x
            out = times(x, start[name])
            return out + shifts[name] if name in shifts else out

        predictions = apply(through, k.astype(jnp.float32), gain, offset)
        return jnp.sum(jax.vmap(loss)(predictions, v.astype(jnp.float32))), inputs

    shifts = {name: jnp.zeros((k.shape[0], w.shape[1]), jnp.float32) for name, w in memory.change.items()}
    slopes, inputs = jax.grad(losses, has_aux=True)(shifts)

    def at_token(name: str, x: Array) -> Array:
        if name not in index:
            return times(x, start[name])
        beta, f, g = (part[index[name]] for part in weighing[:3])
        read = beta[:, None] * times(x, memory.change[name])
        if learner.momentum:
            read += f[:, None] * times(x, memory.momentum[name])
        read += times(x, origin[name]) * (beta[:, None] if learner.decay_to == "zero" else 1)
        alike = product("ti,si->ts", x.astype(dtype), inputs[name].astype(dtype)) * g
        return read - product("ts,so->to", alike.astype(dtype), slopes[name].astype(dtype))

    new: tuple[Weights, Weights] = {}, {}
    for name, i in index.items():
        x, u = inputs[name].astype(dtype), slopes[name]
        # Weighing the smaller side: gradients at the outputs, one number per token.
        write = product("si,so->io", x, (weighing.gradients[i, -1][:, None] * u).astype(dtype))
        beta = weighing.carried[i, -1]
        kept = beta * memory.change[name]
        kept = kept - (1 - beta) * origin[name] if learner.decay_to == "zero" else kept
        if learner.momentum:
            kept += weighing.momentum[i, -1] * memory.momentum[name]
            push = product("si,so->io", x, (weighing.last_gradients[i][:, None] * u).astype(dtype))
            new[1][name] = weighing.last_momentum[i] * memory.momentum[name] - push
        new[0][name] = kept - write
    reads = at_token if learner.readout == "dual" else lambda name, x: times(x, start[name])
    return Memory(*new), apply(reads, q.astype(jnp.float32), gain, offset).astype(dtype)


def _exact_chunk(
    learner: Learner, fixed: Fixed, memory: Memory, document: Int[Array, " B"], tokens: Tokens, docs: Documents
) -> tuple[Memory, Float[Array, "B C H D"]]:
    """The linear memory with per-token gradients; documents may begin anywhere."""
    masks = masks_of(docs, document)
    weighing = jax.tree.map(lambda x: x[:, :, 0], weigh(learner, tokens, masks.visible))
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in tokens[:3])
    dtype, (name,) = q.dtype, memory.change
    origin, to_zero = fixed.weights[name].astype(jnp.float32), learner.decay_to == "zero"
    own = masks.own[:, None, :, None]
    beta, f = weighing.carried[..., None], weighing.momentum[..., None]

    def found(x: Array, carried: Weights, begun: Weights | None) -> Array:
        """x times what a token's document found: the carried matrix, or what a document begins with."""
        first = 0.0 if begun is None else product("bhci,hio->bhco", x, begun[name].astype(dtype))
        return jnp.where(own, product("bhci,bhio->bhco", x, carried[name].astype(dtype)), first)

    start = (None, None) if fixed.start is None else fixed.start

    def carried(x: Array, beta: Array, f: Array) -> Array:
        """x times what a token's weights hold of the found and the initial ones."""
        new = product("bhci,hio->bhco", x, origin.astype(dtype)) * (beta if to_zero else 1)
        new += beta * found(x, memory.change, start[0])
        return new + f * found(x, memory.momentum, start[1]) if learner.momentum else new

    beta_before, f_before, g = before_tokens(learner, tokens, weighing, masks.visible)
    beta_before, f_before = beta_before[..., None], f_before[..., None]
    alike = product("bhti,bhsi->bhts", k, k)
    inverse = unit_lower_inverse(g * alike)
    rest = carried(k, beta_before, f_before) - v.astype(jnp.float32)
    slopes = product("bhts,bhso->bhto", inverse, rest).astype(dtype)
    scores = product("bhti,bhsi->bhts", q, k) * weighing.gradients
    out = carried(q, beta, f) - product("bhts,bhso->bhto", scores.astype(dtype), slopes)
    last = _where(masks.stays, memory, beginning(fixed, memory))
    last_beta, last_f = beta[:, :, -1:], f[:, :, -1:]
    kept = last_beta * last.change[name]
    kept = kept - (1 - last_beta) * origin[None] if to_zero else kept
    pushed: Weights = {}
    if learner.momentum:
        kept += last_f * last.momentum[name]
        push = product("bhsi,bhso->bhio", _scaled(k, weighing.last_gradients), slopes)
        pushed = {name: weighing.last_momentum[..., None, None] * last.momentum[name] - push}
    write = product("bhsi,bhso->bhio", _scaled(k, weighing.gradients[..., -1, :]), slopes)
    return Memory({name: kept - write}, pushed), jnp.moveaxis(out, 1, 2).astype(dtype)


def _scaled(x: Float[Array, "B H C I"], weight: Float[Array, "B H C"]) -> Array:
    return (x.astype(jnp.float32) * weight[..., None]).astype(x.dtype)


def _where(rows: Bool[Array, " B"], new: Memory, old: Memory) -> Memory:
    return jax.tree.map(lambda a, b: jnp.where(rows[:, None, None, None], a, b), new, old)
