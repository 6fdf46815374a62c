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

from recallax.pallas_kernels.chunking import (
    DocumentIds,
    accumulator_dtype,
    index_documents,
    last_valid,
    single_document,
)
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernel, require
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.grid import gather_tokens
from recallax.pallas_kernels.neural_memory import materialized_gradients, reference, xla
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, Weights
from recallax.pallas_kernels.neural_memory.update_coefficients import (
    FastWeights,
    MemoryInputs,
    OuterParams,
    initial_memory,
    pad_to_chunks,
)

__all__ = [
    "IMPLEMENTATIONS",
    "FastWeights",
    "InnerOptimizer",
    "MemoryInputs",
    "NeuralState",
    "OuterParams",
    "current_delta",
    "init_neural_state",
    "is_memory_reset",
    "neural_memory",
    "neural_memory_read",
    "neural_memory_step",
]

IMPLEMENTATIONS = {
    "reference": reference.neural_memory,
    "materialized": materialized_gradients.neural_memory,
    "xla": xla.neural_memory,
    "mosaic_gpu": lazy_kernel("recallax.pallas_kernels.neural_memory.mosaic_gpu", "neural_memory"),
    "mosaic_tpu": lazy_kernel("recallax.pallas_kernels.neural_memory.mosaic_tpu", "neural_memory"),
}


class NeuralState(NamedTuple):
    """What a row remembers. Under per-token gradients nothing is pending. Zeros before any token."""

    fast_weights: FastWeights
    """At the document's last boundary between chunks."""
    pending_tokens: MemoryInputs | None
    """[B, chunk - 1, H, ...]: the tokens since, the oldest first; their queries are not kept (zero wide)."""
    num_tokens: Int[Array, " B"]
    """Tokens of the document so far."""


def init_neural_state(inner_optimizer: InnerOptimizer, batch: int, num_heads: int, head_dim: int) -> NeuralState:
    """The state before any token, zeros throughout."""
    nothing = {
        name: jnp.zeros((batch, num_heads, *s), jnp.float32)
        for name, s in inner_optimizer.trainable_shapes(head_dim).items()
    }
    memory = FastWeights(nothing, nothing if inner_optimizer.momentum else {})
    if inner_optimizer.gradient != "chunk_start":
        return NeuralState(memory, None, jnp.zeros(batch, jnp.int32))
    shape = (batch, inner_optimizer.chunk_size - 1, num_heads)
    key, gate = (jnp.zeros((*shape, n), jnp.float32) for n in (head_dim, len(nothing)))
    none = jnp.zeros((*shape, 0), jnp.float32)
    return NeuralState(memory, MemoryInputs(none, key, key, gate, gate, gate), jnp.zeros(batch, jnp.int32))


def neural_memory(
    inner_optimizer: InnerOptimizer,
    tokens: MemoryInputs,
    outer_params: OuterParams,
    *,
    state: NeuralState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
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
    learned = inner_optimizer.trainable_shapes(width)
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    for name, part in zip(("k", "v"), tokens[1:3], strict=True):
        require(op, part.shape == tokens.q.shape, f"{name} has shape {part.shape}; it must be q's {tokens.q.shape}")
    wanted = (b, t, h, len(learned))
    for name, part in zip(("lr", "log_momentum", "log_decay"), tokens[3:], strict=True):
        require(op, part.shape == wanted, f"{name} has shape {part.shape}; it must be {wanted}")
    for name, shape in inner_optimizer.network.shapes(width).items():
        have = outer_params.initial_weights[name].shape if name in outer_params.initial_weights else None
        require(op, have == (h, *shape), f"weight {name} has shape {have}; it must be {(h, *shape)}")
    docs = single_document(b, t) if segment_ids is None else index_documents(segment_ids)
    empty = state is None
    state = init_neural_state(inner_optimizer, b, h, width) if state is None else state
    held = jax.tree.map(lambda x: x.astype(accumulator_dtype(tokens.q.dtype)), state.fast_weights)
    begun = _where_rows(is_memory_reset(inner_optimizer, state.num_tokens), initial_memory(outer_params, held), held)
    phase = state.num_tokens % inner_optimizer.chunk_size
    if empty or state.pending_tokens is None:
        whole, ends = pad_to_chunks(tokens, docs, inner_optimizer.chunk_size)
    else:
        whole, ends = pad_to_chunks(
            *_concat_pending(state.pending_tokens, phase, tokens, docs), inner_optimizer.chunk_size
        )
    parts = (
        ends
        if inner_optimizer.reset_interval is None
        else _split_at_resets(ends, state.num_tokens - phase, inner_optimizer.reset_interval)
    )
    out, memory = call_implementation(
        op, IMPLEMENTATIONS, implementation, inner_optimizer, outer_params, whole, parts, begun
    )
    memory = _where_rows(docs.valid.any(axis=1), memory, held)
    if state.pending_tokens is None:
        return out[:, :t], NeuralState(memory, None, _count_tokens(docs, state.num_tokens))
    out = out[:, :t] if empty else gather_tokens(out, phase[:, None] + jnp.arange(t)[None])
    wrong = _misaligned_rows(ends, inner_optimizer.chunk_size)[:, None, None, None]
    out = jnp.where(wrong, jnp.full_like(out, jnp.nan), out)
    return out, NeuralState(memory, *_remaining_tokens(whole, ends, state.num_tokens, inner_optimizer.chunk_size))


def neural_memory_step(
    inner_optimizer: InnerOptimizer,
    token: MemoryInputs,
    outer_params: OuterParams,
    state: NeuralState,
    active: Bool[Array, " B"],
) -> tuple[Float[Array, "B H D"], NeuralState]:
    """One token [B, H, ...] of each active row; inactive rows keep their state and output 0."""
    tokens = jax.tree.map(lambda x: x[:, None], token)
    out, new = neural_memory(
        inner_optimizer, tokens, outer_params, state=state, segment_ids=active.astype(jnp.int32)[:, None]
    )
    new = jax.tree.map(lambda a, b: jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state)
    return jnp.where(active[:, None, None], out[:, 0], 0), new


def is_memory_reset(inner_optimizer: InnerOptimizer, num_tokens: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Whether the token after `num_tokens` tokens of a document finds the memory that documents begin with."""
    return (
        num_tokens == 0 if inner_optimizer.reset_interval is None else num_tokens % inner_optimizer.reset_interval == 0
    )


def current_delta(inner_optimizer: InnerOptimizer, outer_params: OuterParams, state: NeuralState) -> Weights:
    """What has changed in the weights that the next token finds, [B, H, I, O]; what is pending is not in them."""
    return _where_rows(
        is_memory_reset(inner_optimizer, state.num_tokens),
        initial_memory(outer_params, state.fast_weights),
        state.fast_weights,
    ).delta


def neural_memory_read(
    inner_optimizer: InnerOptimizer, outer_params: OuterParams, delta: Weights, q: Float[Array, "B N H D"]
) -> Float[Array, "B N H D"]:
    """What memories that have changed by `delta` [B, H, I, O] answer to N questions each, without learning."""

    def one_head(fixed: OuterParams, change: Weights, q: Float[Array, "N D"]) -> Float[Array, "N D"]:
        def times(name: str, x: Array) -> Array:
            weight = fixed.initial_weights[name].astype(jnp.float32)
            weight = weight + change[name] if name in change else weight
            return einsum_f32("ni,io->no", x.astype(q.dtype), weight.astype(q.dtype))

        wide = (x.astype(jnp.float32) for x in (q, fixed.norm_scale, fixed.norm_bias))
        return inner_optimizer.network.apply(times, *wide).astype(q.dtype)

    per_head = jax.vmap(one_head, in_axes=(0, 0, 1), out_axes=1)
    return jax.vmap(per_head, in_axes=(None, 0, 0))(outer_params, delta, q)


def _split_at_resets(document_ids: DocumentIds, num_before: Int[Array, " B"], reset_interval: int) -> DocumentIds:
    """Documents cut every `reset_interval` tokens; the first has had `num_before` tokens before these rows."""
    seen = jnp.cumsum(document_ids.valid, axis=1, dtype=num_before.dtype)
    starts = document_ids.index != jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    gone = jax.lax.cummax(jnp.where(starts, seen - document_ids.valid.astype(seen.dtype), -num_before[:, None]), axis=1)
    shard = jnp.maximum(seen - 1 - gone, 0) // reset_interval  # padding belongs to the token before it
    first = num_before // reset_interval  # a fresh memory has been put in already where a shard begins
    cut = shard != jnp.concatenate([first[:, None], shard[:, :-1]], axis=1)
    return DocumentIds(jnp.cumsum(starts | cut, axis=1, dtype=document_ids.index.dtype), document_ids.valid)


def _concat_pending(
    pending_tokens: MemoryInputs, chunk_offset: Int[Array, " B"], tokens: MemoryInputs, document_ids: DocumentIds
) -> tuple[MemoryInputs, DocumentIds]:
    """Each row's pending tokens and then its new ones, so that its chunks begin where they began in its document."""
    slots, length = pending_tokens.k.shape[1], document_ids.index.shape[1]
    place = jnp.arange(slots + length)[None]
    old = place < chunk_offset[:, None]
    source = jnp.where(old, place, slots + jnp.clip(place - chunk_offset[:, None], 0, length - 1))
    pending_tokens = pending_tokens._replace(q=jnp.zeros(pending_tokens.k.shape, pending_tokens.k.dtype))
    joined = jax.tree.map(
        lambda a, b: gather_tokens(jnp.concatenate([a.astype(b.dtype), b], axis=1), source), pending_tokens, tokens
    )
    none = jnp.zeros((chunk_offset.shape[0], slots), jnp.int32)
    index = gather_tokens(jnp.concatenate([none, document_ids.index], axis=1), source)
    fresh = place - chunk_offset[:, None] < length
    valid = old | (fresh & gather_tokens(jnp.concatenate([none > 0, document_ids.valid], axis=1), source))
    return joined, DocumentIds(jnp.where(old, 0, index), valid)


def _remaining_tokens(
    tokens: MemoryInputs, document_ids: DocumentIds, num_tokens: Int[Array, " B"], chunk_size: int
) -> tuple[MemoryInputs, Int[Array, " B"]]:
    """The tokens of the last document that fill no chunk, and how many tokens it has."""
    # The first document's earlier whole chunks are not in these rows.
    total = _count_tokens(document_ids, num_tokens - num_tokens % chunk_size)
    first = (jnp.maximum(last_valid(document_ids), 0) // chunk_size * chunk_size).astype(num_tokens.dtype)
    place = jnp.arange(chunk_size - 1, dtype=num_tokens.dtype)[None]
    left = place < (total % chunk_size)[:, None]
    rest = jax.tree.map(lambda x: gather_tokens(x, jnp.minimum(first[:, None] + place, x.shape[1] - 1)), tokens)
    rest = rest._replace(q=rest.q[..., :0])
    rest = jax.tree.map(lambda x: jnp.where(left[..., None, None], x.astype(jnp.float32), 0), rest)
    return rest, total


def _count_tokens(document_ids: DocumentIds, num_before: Int[Array, " B"]) -> Int[Array, " B"]:
    """Tokens of each row's last document; the first has had some before."""
    last = document_ids.index[:, -1:]
    seen = jnp.sum(document_ids.valid & (document_ids.index == last), axis=1, dtype=num_before.dtype)
    return seen + jnp.where(last[:, 0] == 0, num_before, 0)


def _misaligned_rows(document_ids: DocumentIds, chunk_size: int) -> Bool[Array, " B"]:
    """Some document begins inside a chunk, or has a gap before its end."""
    before = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    begins = document_ids.index != before
    inside = jnp.arange(document_ids.index.shape[1])[None] % chunk_size != 0
    held = jnp.pad(document_ids.valid[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    resumes = document_ids.valid & ~held & ~begins
    return ((begins & inside) | resumes).any(axis=1)


def _where_rows(batch: Bool[Array, " B"], new: FastWeights, old: FastWeights) -> FastWeights:
    return jax.tree.map(lambda a, b: jnp.where(batch[:, None, None, None], a, b), new, old)
