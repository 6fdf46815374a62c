"""Linear attention on TPUs: chunk scans with the state in VMEM; intermediate states are never stored.

The forward pass is that of `chunked_linear_attention.py`. The backward pass consists of two scans, each with one state:
the gradients of the queries need the state S, forward in time; those of keys and values need the gradient of the state,
backward in time. The gradient of the log-decay needs both at each token, but it equals a sum over tokens,

    dg_t = sum_{i >= t} (q_i.dq_i - k_i.dk_i) + <dS_T, S_T>

because g_t scales all contributions from tokens before t to outputs at t and later (as in flash-linear-attention; GLA,
arXiv 2312.06635, appendix C). The sum ends at the next document start, so no rounding error crosses documents.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.linear_attention.reference import LinearAttentionArgs
from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.blockwise_channel_decay import channel_suffix_sums, chunk_decay
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import (
    ChunkGrid,
    head_major,
    make_chunk_grid,
    require_uniform_dtype,
    split_chunks,
    sum_per_group,
    time_major,
)
from recallax.pallas_kernels.mosaic_tpu.chunk_operands import ChunkOperand, PerChunkOperand, TokenOperand, output_shape
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import Matrices, chunk_scan
from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_tn

CHUNK = 128
"""Tokens of a chunk."""
CHANNEL_CHUNK = 64
"""Tokens of a chunk with a decay per channel, whose scores cost more per pair of tokens."""


def linear_attention(args: LinearAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute linear attention on a TPU.

    The arguments and the result are those of `linear_attention.reference.linear_attention`.

    Raises:
        Unsupported: The dtypes differ or there is no TPU.
    """
    q, k, v, log_decay, state, document_ids, scale = args
    length = q.shape[1]
    per_channel = log_decay is not None and log_decay.shape[-1] > 1
    chunk_grid = make_chunk_grid(CHANNEL_CHUNK if per_channel else CHUNK, length, v, q.shape[2])
    require_uniform_dtype(q=q, k=k, v=v)
    if document_ids is not None:
        k = jnp.where(document_ids.valid[..., None, None], k, jnp.zeros((), k.dtype))  # padding does not write
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    gate = decays.document_log_decay(log_decay, document_ids, v.shape[2])
    gate = None if gate is None else head_major(gate, chunk_grid)
    q, k, v = (head_major(x, chunk_grid) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    out, final = _core(chunk_grid, _LinearAttentionOperands(q, k, v, gate), state)
    return time_major(out, length), final


class _LinearAttentionOperands(NamedTuple):
    """Head-major arrays of whole chunks."""

    q: Float[Array, "B G T K"]
    k: Float[Array, "B G T K"]
    v: Float[Array, "B H T V"]
    log_decay: Float[Array, "B H T W"] | None
    """Log-decay that includes the document boundaries."""

    def operands(self, chunk_grid: ChunkGrid) -> tuple[ChunkOperand, ...]:
        tokens = (TokenOperand(self.q), TokenOperand(self.k), TokenOperand(self.v))
        return (*tokens, *_decay_operands(chunk_grid, self.log_decay))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid, inputs: _LinearAttentionOperands, state: Float[Array, "B H K V"]
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H K V"]]:
    """Return the output and the final state."""
    body = functools.partial(_chunk, inputs.v.dtype)
    (final,), (out,) = chunk_scan(
        "linear_attention_forward",
        body,
        chunk_grid,
        (state,),
        inputs.operands(chunk_grid),
        (TokenOperand(inputs.v),),
    )
    return out, final


def _decay_operands(chunk_grid: ChunkGrid, log_decay: Float[Array, "B H T W"] | None) -> tuple[ChunkOperand, ...]:
    if log_decay is None:
        return ()
    if log_decay.shape[-1] > 1:
        return (TokenOperand(log_decay),)
    return (PerChunkOperand(decays.running_sums(split_chunks(log_decay[..., 0], chunk_grid))),)


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    *gates: Float[Array, "2 C"] | Float[Array, "C K"],
) -> tuple[Matrices, Matrices]:
    """Return the state [K, V] after a chunk and the chunk's output [C, V]."""
    (state,) = states
    decay = chunk_decay(gates, *q.shape)
    out = dot(decay.scores(q, k, dtype), v, dtype) + dot(decays.scale_by_decay(q, decay.decay_from_start), state, dtype)
    written = dot_tn(decays.scale_by_decay(k, decay.decay_to_end), v, dtype)
    return (decays.scale_by_decay(state, decay.total_decay) + written,), (out,)


def _query_grad_chunk(
    dtype: DTypeLike, states: Matrices, q: Array, k: Array, v: Array, grad: Array, *gates: Array
) -> tuple[Matrices, Matrices]:
    """Return the state after a chunk, the gradient of q and, with a decay, q.dq; forward in time."""

    def read(q: Array) -> tuple[Matrices, Matrices]:
        after, out = _chunk(dtype, states, q, k, v, *gates)
        return out, after

    _, pull, after = jax.vjp(read, q, has_aux=True)
    (dq,) = pull((grad,))
    return after, (dq, _token_dots(q, dq, *gates)) if gates else (dq,)


def _key_value_grad_chunk(
    dtype: DTypeLike, states: Matrices, q: Array, k: Array, v: Array, grad: Array, *gates: Array
) -> tuple[Matrices, Matrices]:
    """Return the gradients of the state before a chunk, of k, v and, with a decay, the log-decay; backward in time.

    With a decay, `states` includes the suffix sum after the chunk, and `gates` includes q.dq.
    """
    state_grad, *sums = states
    rows, q_dq = gates[:1], gates[1:]

    def write(state: Array, k: Array, v: Array) -> tuple[Matrices, Matrices]:
        return _chunk(dtype, (state,), q, k, v, *rows)

    # The chunk is linear in its state, so these gradients do not depend on the state.
    _, pull = jax.vjp(write, jnp.zeros_like(state_grad), k, v)
    previous_grad, dk, dv = pull(((state_grad,), (grad,)))
    if not gates:
        return (previous_grad,), (dk, dv)
    suffix_sums = channel_suffix_sums if rows[0].shape == k.shape else decays.token_suffix_sums
    decay_grad, previous_sum = suffix_sums(q_dq[0] - _token_dots(k, dk, *rows), *sums, *rows)
    return (previous_grad, previous_sum), (dk, dv, decay_grad)


def _token_dots(
    x: Float[Array, "C K"], y: Float[Array, "C K"], gate: Array
) -> Float[Array, "1 C"] | Float[Array, "C K"]:
    """Return x.y of each token, or x * y if the decay is per channel."""
    return x * y if gate.shape == x.shape else jnp.sum(x * y, axis=1, keepdims=True).T


class _LinearAttentionResiduals(NamedTuple):
    inputs: _LinearAttentionOperands
    state: Float[Array, "B H K V"]
    final_state: Float[Array, "B H K V"]


def _forward(
    chunk_grid: ChunkGrid, inputs: _LinearAttentionOperands, state: Array
) -> tuple[tuple[Array, Array], _LinearAttentionResiduals]:
    out, final = _core(chunk_grid, inputs, state)
    return (out, final), _LinearAttentionResiduals(inputs, state, final)


def _backward(
    chunk_grid: ChunkGrid, residuals: _LinearAttentionResiduals, grads: tuple[Array, Array]
) -> tuple[_LinearAttentionOperands, Array]:
    (q, k, v, log_decay), state, final = residuals
    grad, state_grad = grads
    rows, heads, length, _ = v.shape
    inputs = (
        TokenOperand(q),
        TokenOperand(k),
        TokenOperand(v),
        TokenOperand(grad),
        *_decay_operands(chunk_grid, log_decay),
    )
    # One gradient per value head; those that share a key head are summed outside the kernel, in float32.
    per_v_head = TokenOperand(
        output_shape(rows, heads, length, q.shape[3], dtype=q.dtype if q.shape[1] == heads else jnp.float32)
    )
    dots, sums = (), ()
    if log_decay is not None:
        per_channel = log_decay.shape[-1] > 1
        row = PerChunkOperand(output_shape(rows, heads, chunk_grid.num_chunks, 1, chunk_grid.chunk_size))
        dots = (TokenOperand(log_decay) if per_channel else row,)
        at_end = jnp.sum(state_grad * final, axis=3)[:, :, None]
        sums = (at_end if per_channel else jnp.sum(at_end, axis=3, keepdims=True),)
    query_body, key_value_body = (functools.partial(f, v.dtype) for f in (_query_grad_chunk, _key_value_grad_chunk))
    _, (dq, *q_dq) = chunk_scan(
        "linear_attention_reading", query_body, chunk_grid, (state,), inputs, (per_v_head, *dots)
    )
    inputs += tuple(type(operand)(x) for operand, x in zip(dots, q_dq, strict=True))
    (initial_grad, *_), (dk, dv, *decay_grad) = chunk_scan(
        "linear_attention_writing",
        key_value_body,
        chunk_grid._replace(reverse=True),
        (state_grad, *sums),
        inputs,
        (per_v_head, TokenOperand(v), *dots),
    )
    dq, dk = (sum_per_group(x, q.shape[1]).astype(q.dtype) for x in (dq, dk))
    decay_grad = None if log_decay is None else decay_grad[0].reshape(log_decay.shape)
    return _LinearAttentionOperands(dq, dk, dv, decay_grad), initial_grad


_core.defvjp(_forward, _backward)
