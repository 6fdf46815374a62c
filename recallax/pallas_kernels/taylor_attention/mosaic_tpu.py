"""BASED on TPUs: the polynomial of the scores inside a chunk, the symmetric features for the carried state only.

Feature f is w_f a_f b_f, where a_f and b_f are a channel of x each or 1. So features are two products with 0-1
matrices, which pick the channels, and never exist outside VMEM. The backward pass takes the states at the chunks'
starts from the forward pass and walks in reverse, as that of the delta rule.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.feature_maps import taylor, taylor_score
from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.blockwise_channel_decay import chunk_decay
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import (
    ChunkGrid,
    ChunkOperand,
    Matrices,
    PerChunkOperand,
    SharedOperand,
    TokenOperand,
    chunk_scan,
    dot,
    dot_tn,
    head_major,
    make_chunk_grid,
    output_shape,
    require_uniform_dtype,
    save_states,
    split_chunks,
    time_major,
)

CHUNK = 128


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    feature_map: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The op's form for TPUs, of symmetric features and of float32 or bfloat16 inputs of one dtype."""
    length, width = q.shape[1], q.shape[3]
    steps = make_chunk_grid(CHUNK, length, v, q.shape[2])
    require_uniform_dtype(q=q, k=k, v=v)
    if feature_map is not taylor:
        raise Unsupported("the features are not symmetric; it holds each product of two channels once")
    if document_ids is not None:  # padding does not write; as a key of zeros would, with its constant feature
        v = jnp.where(document_ids.valid[..., None, None], v, jnp.zeros((), v.dtype))
    gate = decays.document_log_decay(None, document_ids, v.shape[2])
    gate = None if gate is None else decays.running_sums(split_chunks(head_major(gate, steps)[..., 0], steps))
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], _feature_factors(width).shape[1] // 2, v.shape[3]), jnp.float32)
    q, k, v = (head_major(x, steps) for x in (q, k, v))
    out, final = _core(steps, q, k, v, gate, state)
    return time_major(out, length), final


def _feature_factors(width: int) -> np.ndarray:
    """[K + 2, 2 F]: which channel each feature's two factors are, 1 added to it, and (first half) the weight."""
    first, second, weight = [width, *[width] * width], [width, *range(width)], [1.0] * (width + 1)
    for i in range(width):
        first += [i] * (width - i)
        second += range(i, width)
        weight += [math.sqrt(0.5)] + [1.0] * (width - i - 1)
    table = np.zeros((width + 2, 2 * len(first)), np.float32)
    table[first + second, np.arange(2 * len(first))] = 1
    table[width + 1, : len(first)] = weight
    return table


def _features(x: Float[Array, "C K"], factors: Float[Array, "K2 F2"], dtype: DTypeLike) -> Float[Array, "C F"]:
    width, count = x.shape[1], factors.shape[1] // 2
    first, second = factors[:, :count], factors[:, count:]
    a = dot(x, first[:width], dtype) + first[width : width + 1]
    b = dot(x, second[:width], dtype) + second[width : width + 1]
    return a * b * first[width + 1 :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid,
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H T K"],
    v: Float[Array, "B H T V"],
    log_decay: Float[Array, "B H N 2 C"] | None,
    state: Float[Array, "B H F V"],
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H F V"]]:
    """Of whole chunks, head-major; the gate holds the borders of documents."""
    body = functools.partial(_chunk, v.dtype)
    (final,), (out,) = chunk_scan(
        "taylor_attention_forward", body, chunk_grid, (state,), _operands(q, k, v, log_decay), (TokenOperand(v),)
    )
    return out, final


def _operands(q: Array, k: Array, v: Array, log_decay: Array | None) -> tuple[ChunkOperand, ...]:
    given = (
        SharedOperand(jnp.asarray(_feature_factors(q.shape[3]))),
        TokenOperand(q),
        TokenOperand(k),
        TokenOperand(v),
    )
    return given if log_decay is None else (*given, PerChunkOperand(log_decay))


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    factors: Float[Array, "K2 F2"],
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    *gates: Float[Array, "2 C"],
) -> tuple[Matrices, Matrices]:
    """The state [F, V] after a chunk and the chunk's sums [C, V]."""
    (state,) = states
    decay = chunk_decay(gates, q.shape[0], state.shape[0])
    phi_q, phi_k = (_features(x, factors, dtype) for x in (q, k))
    out = dot(decay.scores(q, k, dtype, taylor_score), v, dtype)
    out = out + dot(decays.scale_by_decay(phi_q, decay.decay_from_start), state, dtype)
    written = dot_tn(decays.scale_by_decay(phi_k, decay.decay_to_end), v, dtype)
    return (decays.scale_by_decay(state, decay.total_decay) + written,), (out,)


def _backward_chunk(
    dtype: DTypeLike,
    states: Matrices,
    grad: Array,
    state: Array,
    factors: Array,
    q: Array,
    k: Array,
    v: Array,
    *gates: Array,
) -> tuple[Matrices, Matrices]:
    """The slope of the state before a chunk, and those of q, k and v; backward in time."""

    def forward(state: Array, q: Array, k: Array, v: Array) -> tuple[Matrices, Matrices]:
        return _chunk(dtype, (state,), factors, q, k, v, *gates)

    _, pull = jax.vjp(forward, state, q, k, v)
    early, *slopes = pull((states, (grad,)))
    return (early,), tuple(slopes)


type TaylorResiduals = tuple[Array, Array, Array, Array | None, Array]


def _forward(
    chunk_grid: ChunkGrid, q: Array, k: Array, v: Array, log_decay: Array | None, state: Array
) -> tuple[tuple[Array, Array], TaylorResiduals]:
    kept = PerChunkOperand(output_shape(*state.shape[:2], chunk_grid.num_chunks, *state.shape[2:]))
    body = save_states(functools.partial(_chunk, v.dtype))
    (final,), (out, states) = chunk_scan(
        "taylor_attention_forward", body, chunk_grid, (state,), _operands(q, k, v, log_decay), (TokenOperand(v), kept)
    )
    return (out, final), (q, k, v, log_decay, states)


def _backward(
    chunk_grid: ChunkGrid, residuals: TaylorResiduals, grads: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    q, k, v, gate, states = residuals
    slope, late = grads
    inputs = (TokenOperand(slope), PerChunkOperand(states), *_operands(q, k, v, gate))
    body = functools.partial(_backward_chunk, v.dtype)
    (early,), (dq, dk, dv) = chunk_scan(
        "taylor_attention_backward",
        body,
        chunk_grid._replace(reverse=True),
        (late,),
        inputs,
        (TokenOperand(q), TokenOperand(k), TokenOperand(v)),
    )
    return dq, dk, dv, None if gate is None else jnp.zeros_like(gate), early


_core.defvjp(_forward, _backward)
