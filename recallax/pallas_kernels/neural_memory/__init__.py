"""Neural memory whose weights learn by gradient descent with momentum and decay along the sequence (Titans, TTT, LaCT).

    S_t = momentum_t S_{t-1} - lr_t grad l(M_at; k_t, v_t)    M_t = keep_t M_{t-1} + S_t    y_t = M_t(q_t)

M is a network (`inner_optimizer.Network`) and keep_t = exp(log_decay_t). M_at are the weights at which the gradient is
computed: by default those at the start of the document's current chunk, so that whole chunks are computed at once.
State: weights and momentum at the last boundary between chunks, float32, and the tokens since then.

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
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernels, require
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.grid import gather_tokens
from recallax.pallas_kernels.neural_memory import materialized_gradients, reference, xla
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer, Weights
from recallax.pallas_kernels.neural_memory.reference import NeuralMemoryArgs
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
    **lazy_kernels("neural_memory", "mosaic_gpu", "mosaic_tpu"),
}


class NeuralState(NamedTuple):
    """State of a row; zeros before any token."""

    fast_weights: FastWeights
    """Memory at the document's last boundary between chunks."""
    pending_tokens: MemoryInputs | None
    """Tokens since then, [B, chunk_size - 1, H, ...] in temporal order, without queries (width 0).

    None with gradients per token, which need no whole chunks.
    """
    num_tokens: Int[Array, " B"]
    """Number of tokens of the document so far."""


def init_neural_state(inner_optimizer: InnerOptimizer, batch: int, num_heads: int, head_dim: int) -> NeuralState:
    """Return the state before any token, which is zeros.

    Args:
        inner_optimizer: Network, loss and update rule.
        batch: Number of rows.
        num_heads: Number of heads.
        head_dim: Width of queries, keys and values.
    """
    zeros = {
        name: jnp.zeros((batch, num_heads, *s), jnp.float32)
        for name, s in inner_optimizer.trainable_shapes(head_dim).items()
    }
    memory = FastWeights(zeros, zeros if inner_optimizer.momentum else {})
    if inner_optimizer.gradient != "chunk_start":
        return NeuralState(memory, None, jnp.zeros(batch, jnp.int32))
    shape = (batch, inner_optimizer.chunk_size - 1, num_heads)
    key, gate = (jnp.zeros((*shape, n), jnp.float32) for n in (head_dim, len(zeros)))
    no_query = jnp.zeros((*shape, 0), jnp.float32)
    return NeuralState(memory, MemoryInputs(no_query, key, key, gate, gate, gate), jnp.zeros(batch, jnp.int32))


def neural_memory(
    inner_optimizer: InnerOptimizer,
    tokens: MemoryInputs,
    outer_params: OuterParams,
    *,
    state: NeuralState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], NeuralState]:
    """Compute the neural memory over whole rows.

    With gradients at the start of chunks, every later document must start at a multiple of `chunk_size` tokens from the
    start of the first one; the output is NaN in rows that violate this.

    Args:
        inner_optimizer: Network, loss and update rule.
        tokens: q, k and v [B, T, H, D]; lr >= 0, log_momentum <= 0 and log_decay <= 0 [B, T, H, L] for the L trainable
            matrices, in the order of `InnerOptimizer.gate_names`.
        outer_params: Initial weights [H, I, O] of all matrices, and scale and bias [H, D] of the network's norm.
        state: State before the row, which belongs to its first document; None: no tokens.
        segment_ids: Document ids; 0 is padding, between documents and on the right. None: one document per row.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output of each token in q's dtype, and the final state.

    Raises:
        ValueError: Shapes do not match.
    """
    b, t, h, width = tokens.q.shape
    _check_shapes(inner_optimizer, tokens, outer_params)
    docs = single_document(b, t) if segment_ids is None else index_documents(segment_ids)
    is_new = state is None
    state = init_neural_state(inner_optimizer, b, h, width) if state is None else state
    fast_weights = jax.tree.map(lambda x: x.astype(accumulator_dtype(tokens.q.dtype)), state.fast_weights)
    resets = is_memory_reset(inner_optimizer, state.num_tokens)
    initial = _where_rows(resets, initial_memory(outer_params, fast_weights), fast_weights)
    phase = state.num_tokens % inner_optimizer.chunk_size
    if is_new or state.pending_tokens is None:
        chunks, docs_padded = pad_to_chunks(tokens, docs, inner_optimizer.chunk_size)
    else:
        joined = _concat_pending(state.pending_tokens, phase, tokens, docs)
        chunks, docs_padded = pad_to_chunks(*joined, inner_optimizer.chunk_size)
    parts = (
        docs_padded
        if inner_optimizer.reset_interval is None
        else _split_at_resets(docs_padded, state.num_tokens - phase, inner_optimizer.reset_interval)
    )
    args = NeuralMemoryArgs(inner_optimizer, outer_params, chunks, parts, initial)
    out, memory = call_implementation("neural_memory", IMPLEMENTATIONS, implementation, args)
    memory = _where_rows(docs.valid.any(axis=1), memory, fast_weights)
    if state.pending_tokens is None:
        return out[:, :t], NeuralState(memory, None, _count_tokens(docs, state.num_tokens))
    out = out[:, :t] if is_new else gather_tokens(out, phase[:, None] + jnp.arange(t)[None])
    wrong = _misaligned_rows(docs_padded, inner_optimizer.chunk_size)[:, None, None, None]
    out = jnp.where(wrong, jnp.full_like(out, jnp.nan), out)
    pending = _remaining_tokens(chunks, docs_padded, state.num_tokens, inner_optimizer.chunk_size)
    return out, NeuralState(memory, *pending)


def _check_shapes(inner_optimizer: InnerOptimizer, tokens: MemoryInputs, outer_params: OuterParams) -> None:
    """Raise ValueError unless the shapes match."""
    op = "neural_memory"
    b, t, h, width = tokens.q.shape
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    for name, part in zip(("k", "v"), tokens[1:3], strict=True):
        require(op, part.shape == tokens.q.shape, f"{name} has shape {part.shape}; it must be q's {tokens.q.shape}")
    gate_shape = (b, t, h, len(inner_optimizer.gate_names))
    for name, part in zip(("lr", "log_momentum", "log_decay"), tokens[3:], strict=True):
        require(op, part.shape == gate_shape, f"{name} has shape {part.shape}; it must be {gate_shape}")
    for name, shape in inner_optimizer.network.shapes(width).items():
        actual = outer_params.initial_weights[name].shape if name in outer_params.initial_weights else None
        require(op, actual == (h, *shape), f"weight {name} has shape {actual}; it must be {(h, *shape)}")


def neural_memory_step(
    inner_optimizer: InnerOptimizer,
    token: MemoryInputs,
    outer_params: OuterParams,
    state: NeuralState,
    active: Bool[Array, " B"],
) -> tuple[Float[Array, "B H D"], NeuralState]:
    """Compute one token of `neural_memory`.

    Args:
        inner_optimizer: Network, loss and update rule.
        token: Token [B, H, ...] of each row.
        outer_params: Initial weights and norm of the network.
        state: State before the token.
        active: Rows that have a token; the others keep their state and output 0.

    Returns:
        Output in q's dtype and state after the token.
    """
    tokens = jax.tree.map(lambda x: x[:, None], token)
    out, new = neural_memory(
        inner_optimizer, tokens, outer_params, state=state, segment_ids=active.astype(jnp.int32)[:, None]
    )
    new = jax.tree.map(lambda a, b: jnp.where(active.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state)
    return jnp.where(active[:, None, None], out[:, 0], 0), new


def is_memory_reset(inner_optimizer: InnerOptimizer, num_tokens: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Return True if the memory is reset to its initial value before the next token.

    Args:
        inner_optimizer: Defines the reset interval.
        num_tokens: Number of tokens of the document so far.
    """
    return (
        num_tokens == 0 if inner_optimizer.reset_interval is None else num_tokens % inner_optimizer.reset_interval == 0
    )


def current_delta(inner_optimizer: InnerOptimizer, outer_params: OuterParams, state: NeuralState) -> Weights:
    """Return the difference of the fast weights from the initial ones before the next token, [B, H, I, O].

    Args:
        inner_optimizer: Network, loss and update rule.
        outer_params: Initial weights and norm of the network.
        state: The state; its pending tokens have no effect.
    """
    return _where_rows(
        is_memory_reset(inner_optimizer, state.num_tokens),
        initial_memory(outer_params, state.fast_weights),
        state.fast_weights,
    ).delta


def neural_memory_read(
    inner_optimizer: InnerOptimizer, outer_params: OuterParams, delta: Weights, q: Float[Array, "B N H D"]
) -> Float[Array, "B N H D"]:
    """Read memories with N queries each, without an update.

    Args:
        inner_optimizer: Network, loss and update rule.
        outer_params: Initial weights and norm of the network.
        delta: Difference of the weights from the initial ones, [B, H, I, O] by name.
        q: Queries.

    Returns:
        Outputs in q's dtype.
    """

    def one_head(params: OuterParams, delta: Weights, q: Float[Array, "N D"]) -> Float[Array, "N D"]:
        def times(name: str, x: Array) -> Array:
            weight = params.initial_weights[name].astype(jnp.float32)
            weight = weight + delta[name] if name in delta else weight
            return einsum_f32("ni,io->no", x.astype(q.dtype), weight.astype(q.dtype))

        arrays = (x.astype(jnp.float32) for x in (q, params.norm_scale, params.norm_bias))
        return inner_optimizer.network.apply(times, *arrays).astype(q.dtype)

    per_head = jax.vmap(one_head, in_axes=(0, 0, 1), out_axes=1)
    return jax.vmap(per_head, in_axes=(None, 0, 0))(outer_params, delta, q)


def _split_at_resets(document_ids: DocumentIds, num_before: Int[Array, " B"], reset_interval: int) -> DocumentIds:
    """Split documents every `reset_interval` tokens; the first document has `num_before` tokens before the row."""
    seen = jnp.cumsum(document_ids.valid, axis=1, dtype=num_before.dtype)
    starts = document_ids.index != jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    num_before_document = jax.lax.cummax(
        jnp.where(starts, seen - document_ids.valid.astype(seen.dtype), -num_before[:, None]), axis=1
    )
    shard = jnp.maximum(seen - 1 - num_before_document, 0) // reset_interval  # padding belongs to the token before it
    first = num_before // reset_interval  # the memory of the first shard has been reset already
    splits = shard != jnp.concatenate([first[:, None], shard[:, :-1]], axis=1)
    return DocumentIds(jnp.cumsum(starts | splits, axis=1, dtype=document_ids.index.dtype), document_ids.valid)


def _concat_pending(
    pending_tokens: MemoryInputs, chunk_offset: Int[Array, " B"], tokens: MemoryInputs, document_ids: DocumentIds
) -> tuple[MemoryInputs, DocumentIds]:
    """Concatenate each row's pending tokens and its new ones, so that chunks are aligned with the document."""
    slots, length = pending_tokens.k.shape[1], document_ids.index.shape[1]
    offset = jnp.arange(slots + length)[None]
    is_pending = offset < chunk_offset[:, None]
    source = jnp.where(is_pending, offset, slots + jnp.clip(offset - chunk_offset[:, None], 0, length - 1))
    pending_tokens = pending_tokens._replace(q=jnp.zeros(pending_tokens.k.shape, pending_tokens.k.dtype))
    joined = jax.tree.map(
        lambda a, b: gather_tokens(jnp.concatenate([a.astype(b.dtype), b], axis=1), source), pending_tokens, tokens
    )
    zeros = jnp.zeros((chunk_offset.shape[0], slots), jnp.int32)
    index = gather_tokens(jnp.concatenate([zeros, document_ids.index], axis=1), source)
    is_new = offset - chunk_offset[:, None] < length
    valid = is_pending | (is_new & gather_tokens(jnp.concatenate([zeros > 0, document_ids.valid], axis=1), source))
    return joined, DocumentIds(jnp.where(is_pending, 0, index), valid)


def _remaining_tokens(
    tokens: MemoryInputs, document_ids: DocumentIds, num_tokens: Int[Array, " B"], chunk_size: int
) -> tuple[MemoryInputs, Int[Array, " B"]]:
    """Return the tokens of the last document after its last whole chunk, and the number of its tokens."""
    # The row does not contain the earlier whole chunks of the first document.
    total = _count_tokens(document_ids, num_tokens - num_tokens % chunk_size)
    first = (jnp.maximum(last_valid(document_ids), 0) // chunk_size * chunk_size).astype(num_tokens.dtype)
    offset = jnp.arange(chunk_size - 1, dtype=num_tokens.dtype)[None]
    is_pending = offset < (total % chunk_size)[:, None]
    rest = jax.tree.map(lambda x: gather_tokens(x, jnp.minimum(first[:, None] + offset, x.shape[1] - 1)), tokens)
    rest = rest._replace(q=rest.q[..., :0])
    rest = jax.tree.map(lambda x: jnp.where(is_pending[..., None, None], x.astype(jnp.float32), 0), rest)
    return rest, total


def _count_tokens(document_ids: DocumentIds, num_before: Int[Array, " B"]) -> Int[Array, " B"]:
    """Number of tokens of each row's last document; the first document has `num_before` tokens before the row."""
    last = document_ids.index[:, -1:]
    seen = jnp.sum(document_ids.valid & (document_ids.index == last), axis=1, dtype=num_before.dtype)
    return seen + jnp.where(last[:, 0] == 0, num_before, 0)


def _misaligned_rows(document_ids: DocumentIds, chunk_size: int) -> Bool[Array, " B"]:
    """Return True for rows in which a document begins inside a chunk or has padding before its end."""
    before = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    starts = document_ids.index != before
    inside = jnp.arange(document_ids.index.shape[1])[None] % chunk_size != 0
    previous_valid = jnp.pad(document_ids.valid[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    resumes = document_ids.valid & ~previous_valid & ~starts
    return ((starts & inside) | resumes).any(axis=1)


def _where_rows(batch: Bool[Array, " B"], new: FastWeights, old: FastWeights) -> FastWeights:
    return jax.tree.map(lambda a, b: jnp.where(batch[:, None, None, None], a, b), new, old)
