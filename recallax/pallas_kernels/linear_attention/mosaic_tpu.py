"""Linear attention on TPUs: each pass walks over the chunks with its state in VMEM, and no other state is ever stored.

Forward as in `xla.py`. Backward in two passes, of which each needs one of the two states: the queries' slopes need
the state S, forward in time; those of keys and values need the slope of the state, backward in time. That of the
log-decay needs both at each token, but it is also a sum over them,

    dg_t = sum_{i >= t} (q_i.dq_i - k_i.dk_i) + <dS_T, S_T>

since g_t scales everything that passes from before t to the readers from t on (as in FlashLinearAttention; GLA, arXiv
2312.06635, appendix C). The sum ends where everything is forgotten, so no rounding leaks over a document's border.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.blockwise_channel_decay import channel_suffix_sums, chunk_decay
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import (
    ChunkGrid,
    ChunkOperand,
    Matrices,
    PerChunkOperand,
    TokenOperand,
    chunk_scan,
    dot,
    dot_tn,
    head_major,
    make_chunk_grid,
    output_shape,
    require_uniform_dtype,
    split_chunks,
    sum_per_group,
    time_major,
)

CHUNK = 128
CHANNEL_CHUNK = 64
"""With a decay per channel."""


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H K V"] | None,
    document_ids: DocumentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for TPUs, of float32 or bfloat16 inputs of one dtype."""
    length = q.shape[1]
    per_channel = log_decay is not None and log_decay.shape[-1] > 1
    steps = make_chunk_grid(CHANNEL_CHUNK if per_channel else CHUNK, length, v, q.shape[2])
    require_uniform_dtype(q=q, k=k, v=v)
    if document_ids is not None:
        k = jnp.where(document_ids.valid[..., None, None], k, jnp.zeros((), k.dtype))  # padding does not write
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    gate = decays.document_log_decay(log_decay, document_ids, v.shape[2])
    gate = None if gate is None else head_major(gate, steps)
    q, k, v = (head_major(x, steps) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    out, final = _core(steps, q, k, v, gate, state)
    return time_major(out, length), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid,
    q: Float[Array, "B G T K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B H T V"],
    log_decay: Float[Array, "B H T W"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H K V"]]:
    """Of whole chunks, head-major, with the borders of documents inside the log-decay."""
    inputs = (TokenOperand(q), TokenOperand(k), TokenOperand(v), *_decay_operands(chunk_grid, log_decay))
    body = functools.partial(_chunk, v.dtype)
    (final,), (out,) = chunk_scan("linear_attention_forward", body, chunk_grid, (state,), inputs, (TokenOperand(v),))
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
    """The state [K, V] after a chunk and the chunk's output [C, V]."""
    (state,) = states
    decay = chunk_decay(gates, *q.shape)
    out = dot(decay.scores(q, k, dtype), v, dtype) + dot(decays.scale_by_decay(q, decay.decay_from_start), state, dtype)
    written = dot_tn(decays.scale_by_decay(k, decay.decay_to_end), v, dtype)
    return (decays.scale_by_decay(state, decay.total_decay) + written,), (out,)


def _query_grad_chunk(
    dtype: DTypeLike, states: Matrices, q: Array, k: Array, v: Array, grad: Array, *gates: Array
) -> tuple[Matrices, Matrices]:
    """The state after a chunk, the slope of q and, with a decay, q.dq; forward in time."""

    def read(q: Array) -> tuple[Matrices, Matrices]:
        after, out = _chunk(dtype, states, q, k, v, *gates)
        return out, after

    _, pull, after = jax.vjp(read, q, has_aux=True)
    (dq,) = pull((grad,))
    return after, (dq, _token_dots(q, dq, *gates)) if gates else (dq,)


def _key_value_grad_chunk(
    dtype: DTypeLike, states: Matrices, q: Array, k: Array, v: Array, grad: Array, *gates: Array
) -> tuple[Matrices, Matrices]:
    """The slope of the state before a chunk, those of k and v and, with a decay, its own; backward in time.

    With a decay, `states` holds the sum behind the chunk as well, and `gates` q.dq.
    """
    late, *sums = states
    rows, q_dq = gates[:1], gates[1:]

    def write(state: Array, k: Array, v: Array) -> tuple[Matrices, Matrices]:
        return _chunk(dtype, (state,), q, k, v, *rows)

    # The chunk is linear in its state, so none of these depends on what the state is.
    _, pull = jax.vjp(write, jnp.zeros_like(late), k, v)
    early, dk, dv = pull(((late,), (grad,)))
    if not gates:
        return (early,), (dk, dv)
    sum_up = channel_suffix_sums if rows[0].shape == k.shape else decays.token_suffix_sums
    decay_slope, earlier = sum_up(q_dq[0] - _token_dots(k, dk, *rows), *sums, *rows)
    return (early, earlier), (dk, dv, decay_slope)


def _token_dots(
    x: Float[Array, "C K"], y: Float[Array, "C K"], gate: Array
) -> Float[Array, "1 C"] | Float[Array, "C K"]:
    """x.y of each token, or of each channel."""
    return x * y if gate.shape == x.shape else jnp.sum(x * y, axis=1, keepdims=True).T


type LinearResiduals = tuple[Array, Array, Array, Array | None, Array, Array]


def _forward(
    chunk_grid: ChunkGrid, q: Array, k: Array, v: Array, log_decay: Array | None, state: Array
) -> tuple[tuple[Array, Array], LinearResiduals]:
    out, final = _core(chunk_grid, q, k, v, log_decay, state)
    return (out, final), (q, k, v, log_decay, state, final)


def _backward(
    chunk_grid: ChunkGrid, residuals: LinearResiduals, grads: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    q, k, v, log_decay, state, final = residuals
    slope, late = grads
    back = chunk_grid._replace(reverse=True)
    rows, heads, length, _ = v.shape
    inputs = (
        TokenOperand(q),
        TokenOperand(k),
        TokenOperand(v),
        TokenOperand(slope),
        *_decay_operands(chunk_grid, log_decay),
    )
    # One slope per value head; those that share a key head are summed outside, in float32.
    own = TokenOperand(
        output_shape(rows, heads, length, q.shape[3], dtype=q.dtype if q.shape[1] == heads else jnp.float32)
    )
    dots, sums = (), ()
    if log_decay is not None:
        per_channel = log_decay.shape[-1] > 1
        row = PerChunkOperand(output_shape(rows, heads, chunk_grid.num_chunks, 1, chunk_grid.chunk_size))
        dots = (TokenOperand(log_decay) if per_channel else row,)
        at_end = jnp.sum(late * final, axis=3)[:, :, None]
        sums = (at_end if per_channel else jnp.sum(at_end, axis=3, keepdims=True),)
    reading, writing = (functools.partial(body, v.dtype) for body in (_query_grad_chunk, _key_value_grad_chunk))
    _, (dq, *q_dq) = chunk_scan("linear_attention_reading", reading, chunk_grid, (state,), inputs, (own, *dots))
    inputs += tuple(type(operand)(x) for operand, x in zip(dots, q_dq, strict=True))
    (early, *_), (dk, dv, *decay_slope) = chunk_scan(
        "linear_attention_writing", writing, back, (late, *sums), inputs, (own, TokenOperand(v), *dots)
    )
    dq, dk = (sum_per_group(x, q.shape[1]).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, None if log_decay is None else decay_slope[0].reshape(log_decay.shape), early


_core.defvjp(_forward, _backward)
