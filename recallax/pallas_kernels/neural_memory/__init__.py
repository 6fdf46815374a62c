"""A memory that learns by gradient descent with momentum and forgetting while it reads: Titans, TTT, LaCT.

    S_t = momentum_t S_{t-1} - lr_t grad l(M_at; k_t, v_t)    M_t = keep_t M_{t-1} + S_t    y_t = M_t(q_t)

M is a network (`learner.Network`), `at` the point where its gradient is taken: by default the weights at the start of
the document's current chunk, so that whole chunks are computed at once. State: weights and momentum at the last
boundary between chunks, float32, and the tokens since.

Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), equations 12 to 18; network and gates per matrix as in its
NeurIPS version; TTT (Sun et al. 2024, arXiv 2407.04620), section 2; LaCT (Zhang et al. 2025, arXiv 2505.23884).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import Documents, accumulator, documents, last_valid, one_document
from recallax.pallas_kernels.dispatch import call, kernel, require
from recallax.pallas_kernels.neural_memory import primal, reference, xla
from recallax.pallas_kernels.neural_memory.inner import Fixed, Memory, Tokens, beginning, filled
from recallax.pallas_kernels.neural_memory.learner import Learner, Weights
from recallax.pallas_kernels.product import product

__all__ = [
    "FORMS",
    "Fixed",
    "Learner",
    "Memory",
    "NeuralState",
    "Tokens",
    "begins",
    "found",
    "init_state",
    "neural_memory",
    "neural_memory_read",
    "neural_memory_step",
]

FORMS = {
    "reference": reference.neural_memory,
    "primal": primal.neural_memory,
    "xla": xla.neural_memory,
    "mosaic_gpu": kernel("recallax.pallas_kernels.neural_memory.mosaic_gpu", "neural_memory"),
    "mosaic_tpu": kernel("recallax.pallas_kernels.neural_memory.mosaic_tpu", "neural_memory"),
}


class NeuralState(NamedTuple):
    """What a row remembers. Under per-token gradients nothing is pending. Zeros before any token."""

    memory: Memory
    """At the document's last boundary between chunks."""
    pending: Tokens | None
    """[B, chunk - 1, H, ...]: the tokens since, the oldest first; their queries are not kept (zero wide)."""
    count: Int[Array, " B"]
    """Tokens of the document so far."""


def init_state(learner: Learner, rows: int, heads: int, width: int) -> NeuralState:
    """The state before any token, zeros throughout."""
    nothing = {name: jnp.zeros((rows, heads, *s), jnp.float32) for name, s in learner.learned(width).items()}
    memory = Memory(nothing, nothing if learner.momentum else {})
    if learner.gradient != "chunk_start":
        return NeuralState(memory, None, jnp.zeros(rows, jnp.int32))
    shape = (rows, learner.chunk - 1, heads)
    key, gate = (jnp.zeros((*shape, n), jnp.float32) for n in (width, len(nothing)))
    none = jnp.zeros((*shape, 0), jnp.float32)
    return NeuralState(memory, Tokens(none, key, key, gate, gate, gate), jnp.zeros(rows, jnp.int32))


def neural_memory(
    learner: Learner,
    tokens: Tokens,
    fixed: Fixed,
    *,
    state: NeuralState | None = None,
    segments: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], NeuralState]:
    """What each token reads, in q's dtype, and the final state.

    tokens: q, k, v [B, T, H, D]; lr >= 0, and the logarithms of momentum and keep, at most 0, [B, T, H, L] for the L
    matrices that learn, in the order of `learner.learned`. fixed: initial weights [H, I, O] of all matrices, gain and
    offset [H, D] of the network's norm. state: belongs to the row's first document; None starts afresh.
    segments: document ids, 0 is padding, which may stand between documents and on the right.

    Under gradients of the chunk's start every document but the first must begin a multiple of `learner.chunk` tokens
    after the first one's beginning; the outputs of a row that breaks this rule are NaN.
    Raises ValueError where shapes disagree.
    """
    op = "neural_memory"
    b, t, h, width = tokens.q.shape
    learned = learner.learned(width)
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    for name, part in zip(("k", "v"), tokens[1:3], strict=True):
        require(op, part.shape == tokens.q.shape, f"{name} has shape {part.shape}; it must be q's {tokens.q.shape}")
    wanted = (b, t, h, len(learned))
    for name, part in zip(("lr", "log_momentum", "log_keep"), tokens[3:], strict=True):
        require(op, part.shape == wanted, f"{name} has shape {part.shape}; it must be {wanted}")
    for name, shape in learner.network.shapes(width).items():
        have = fixed.weights[name].shape if name in fixed.weights else None
        require(op, have == (h, *shape), f"weight {name} has shape {have}; it must be {(h, *shape)}")
    docs = one_document(b, t) if segments is None else documents(segments)
    empty = state is None
    state = init_state(learner, b, h, width) if state is None else state
    held = jax.tree.map(lambda x: x.astype(accumulator(tokens.q.dtype)), state.memory)
    begun = _where(begins(learner, state.count), beginning(fixed, held), held)
    phase = state.count % learner.chunk
    if empty or state.pending is None:
        whole, ends = filled(tokens, docs, learner.chunk)
    else:
        whole, ends = filled(*_after_pending(state.pending, phase, tokens, docs), learner.chunk)
    parts = ends if learner.reset is None else _shards(ends, state.count - phase, learner.reset)
    out, memory = call(op, FORMS, implementation, learner, fixed, whole, parts, begun)
    memory = _where(docs.valid.any(axis=1), memory, held)
    if state.pending is None:
        return out[:, :t], NeuralState(memory, None, _count(docs, state.count))
    out = out[:, :t] if empty else _rows(out, phase[:, None] + jnp.arange(t)[None])
    wrong = _off_grid(ends, learner.chunk)[:, None, None, None]
    out = jnp.where(wrong, jnp.full_like(out, jnp.nan), out)
    return out, NeuralState(memory, *_unfinished(whole, ends, state.count, learner.chunk))


def neural_memory_step(
    learner: Learner, token: Tokens, fixed: Fixed, state: NeuralState, active: Bool[Array, " B"]
) -> tuple[Float[Array, "B H D"], NeuralState]:
    """One token [B, H, ...] of each active row; inactive rows keep their state and output 0."""
    tokens = jax.tree.map(lambda x: x[:, None], token)
    out, new = neural_memory(learner, tokens, fixed, state=state, segments=active.astype(jnp.int32)[:, None])
    new = jax.tree.map(lambda a, b: jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state)
    return jnp.where(active[:, None, None], out[:, 0], 0), new


def begins(learner: Learner, count: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Whether the token after `count` tokens of a document finds the memory that documents begin with."""
    return count == 0 if learner.reset is None else count % learner.reset == 0


def found(learner: Learner, fixed: Fixed, state: NeuralState) -> Weights:
    """What has changed in the weights that the next token finds, [B, H, I, O]; what is pending is not in them."""
    return _where(begins(learner, state.count), beginning(fixed, state.memory), state.memory).change


def neural_memory_read(
    learner: Learner, fixed: Fixed, change: Weights, q: Float[Array, "B N H D"]
) -> Float[Array, "B N H D"]:
    """What memories that have changed by `change` [B, H, I, O] answer to N questions each, without learning."""

    def one_head(fixed: Fixed, change: Weights, q: Float[Array, "N D"]) -> Float[Array, "N D"]:
        def times(name: str, x: Array) -> Array:
            weight = fixed.weights[name].astype(jnp.float32)
            weight = weight + change[name] if name in change else weight
            return product("ni,io->no", x.astype(q.dtype), weight.astype(q.dtype))

        wide = (x.astype(jnp.float32) for x in (q, fixed.gain, fixed.offset))
        return learner.network.apply(times, *wide).astype(q.dtype)

    per_head = jax.vmap(one_head, in_axes=(0, 0, 1), out_axes=1)
    return jax.vmap(per_head, in_axes=(None, 0, 0))(fixed, change, q)


def _shards(docs: Documents, before: Int[Array, " B"], reset: int) -> Documents:
    """Documents cut every `reset` tokens; the first has had `before` tokens before these rows."""
    seen = jnp.cumsum(docs.valid, axis=1, dtype=before.dtype)
    starts = docs.index != jnp.pad(docs.index[:, :-1], ((0, 0), (1, 0)))
    gone = jax.lax.cummax(jnp.where(starts, seen - docs.valid.astype(seen.dtype), -before[:, None]), axis=1)
    shard = jnp.maximum(seen - 1 - gone, 0) // reset  # padding belongs to the token before it
    first = before // reset  # a fresh memory has been put in already where a shard begins
    cut = shard != jnp.concatenate([first[:, None], shard[:, :-1]], axis=1)
    return Documents(jnp.cumsum(starts | cut, axis=1, dtype=docs.index.dtype), docs.valid)


def _after_pending(
    pending: Tokens, phase: Int[Array, " B"], tokens: Tokens, docs: Documents
) -> tuple[Tokens, Documents]:
    """Each row's pending tokens and then its new ones, so that its chunks begin where they began in its document."""
    slots, length = pending.k.shape[1], docs.index.shape[1]
    place = jnp.arange(slots + length)[None]
    old = place < phase[:, None]
    source = jnp.where(old, place, slots + jnp.clip(place - phase[:, None], 0, length - 1))
    pending = pending._replace(q=jnp.zeros(pending.k.shape, pending.k.dtype))
    joined = jax.tree.map(lambda a, b: _rows(jnp.concatenate([a.astype(b.dtype), b], axis=1), source), pending, tokens)
    none = jnp.zeros((phase.shape[0], slots), jnp.int32)
    index = _rows(jnp.concatenate([none, docs.index], axis=1), source)
    fresh = place - phase[:, None] < length
    valid = old | (fresh & _rows(jnp.concatenate([none > 0, docs.valid], axis=1), source))
    return joined, Documents(jnp.where(old, 0, index), valid)


def _unfinished(
    tokens: Tokens, docs: Documents, count: Int[Array, " B"], chunk: int
) -> tuple[Tokens, Int[Array, " B"]]:
    """The tokens of the last document that fill no chunk, and how many tokens it has."""
    # The first document's earlier whole chunks are not in these rows.
    total = _count(docs, count - count % chunk)
    first = (jnp.maximum(last_valid(docs), 0) // chunk * chunk).astype(count.dtype)
    place = jnp.arange(chunk - 1, dtype=count.dtype)[None]
    left = place < (total % chunk)[:, None]
    rest = jax.tree.map(lambda x: _rows(x, jnp.minimum(first[:, None] + place, x.shape[1] - 1)), tokens)
    rest = rest._replace(q=rest.q[..., :0])
    rest = jax.tree.map(lambda x: jnp.where(left[..., None, None], x.astype(jnp.float32), 0), rest)
    return rest, total


def _count(docs: Documents, before: Int[Array, " B"]) -> Int[Array, " B"]:
    """Tokens of each row's last document; the first has had some before."""
    last = docs.index[:, -1:]
    seen = jnp.sum(docs.valid & (docs.index == last), axis=1, dtype=before.dtype)
    return seen + jnp.where(last[:, 0] == 0, before, 0)


def _off_grid(docs: Documents, chunk: int) -> Bool[Array, " B"]:
    """Some document begins inside a chunk, or has a gap before its end."""
    before = jnp.pad(docs.index[:, :-1], ((0, 0), (1, 0)))
    begins = docs.index != before
    inside = jnp.arange(docs.index.shape[1])[None] % chunk != 0
    held = jnp.pad(docs.valid[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    resumes = docs.valid & ~held & ~begins
    return ((begins & inside) | resumes).any(axis=1)


def _where(rows: Bool[Array, " B"], new: Memory, old: Memory) -> Memory:
    return jax.tree.map(lambda a, b: jnp.where(rows[:, None, None, None], a, b), new, old)


def _rows(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
