"""BASED on TPUs: polynomial scores within a chunk, symmetric features for the carried state only.

Feature f is w_f a_f b_f, where a_f and b_f are each a channel of x or 1. So the features are computed by two products
with 0-1 matrices, which select the channels, and exist in VMEM only. The forward pass saves the state at the start of
each chunk, and the backward pass scans the chunks in reverse.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.feature_maps import taylor, taylor_score
from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.blockwise_channel_decay import chunk_decay
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import (
    ChunkGrid,
    head_major,
    make_chunk_grid,
    require_uniform_dtype,
    split_chunks,
    time_major,
)
from recallax.pallas_kernels.mosaic_tpu.chunk_operands import (
    ChunkOperand,
    PerChunkOperand,
    SharedOperand,
    TokenOperand,
)
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import Matrices, chunk_scan, chunk_scan_saving_states
from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_tn
from recallax.pallas_kernels.taylor_attention.reference import TaylorAttentionArgs

CHUNK = 128
"""Tokens of a chunk."""


def taylor_attention(args: TaylorAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Compute the unnormalised sums on a TPU.

    The arguments and the result are those of `taylor_attention.reference.taylor_attention`.

    Raises:
        Unsupported: The features are not symmetric, the dtypes differ or there is no TPU.
    """
    q, k, v, state, document_ids, feature_map = args
    length, width = q.shape[1], q.shape[3]
    chunk_grid = make_chunk_grid(CHUNK, length, v, q.shape[2])
    require_uniform_dtype(q=q, k=k, v=v)
    if feature_map is not taylor:
        raise Unsupported("the features are not symmetric; the kernel stores each product of two channels once")
    if document_ids is not None:
        # Padding does not write. Zero keys would still write through the constant feature, so values are masked.
        v = jnp.where(document_ids.valid[..., None, None], v, jnp.zeros((), v.dtype))
    gate = decays.document_log_decay(None, document_ids, v.shape[2])
    gate = None if gate is None else decays.running_sums(split_chunks(head_major(gate, chunk_grid)[..., 0], chunk_grid))
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], _feature_factors(width).shape[1] // 2, v.shape[3]), jnp.float32)
    q, k, v = (head_major(x, chunk_grid) for x in (q, k, v))
    out, final = _core(chunk_grid, _TaylorOperands(q, k, v, gate), state)
    return time_major(out, length), final


def _feature_factors(width: int) -> np.ndarray:
    """Return the table [K + 2, 2 F] that defines the features.

    Columns [:F] and [F:] are for the first and second factor. Rows [:K] are one-hot in the channel of the factor; row K
    is 1 if the factor is the constant 1; row K + 1 is the weight of the feature, in the first half only.
    """
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


class _TaylorOperands(NamedTuple):
    """Head-major arrays of whole chunks."""

    q: Float[Array, "B H T K"]
    k: Float[Array, "B H T K"]
    v: Float[Array, "B H T V"]
    log_decay: Float[Array, "B H N 2 C"] | None
    """Running sums of the log-decay of the document boundaries; None: one document."""

    def operands(self) -> tuple[ChunkOperand, ...]:
        factors = SharedOperand(jnp.asarray(_feature_factors(self.q.shape[3])))
        tokens = (TokenOperand(self.q), TokenOperand(self.k), TokenOperand(self.v))
        decay = () if self.log_decay is None else (PerChunkOperand(self.log_decay),)
        return (factors, *tokens, *decay)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid, inputs: _TaylorOperands, state: Float[Array, "B H F V"]
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H F V"]]:
    """Return the sums and the final state."""
    body = functools.partial(_chunk, inputs.v.dtype)
    (final,), (out,) = chunk_scan(
        "taylor_attention_forward", body, chunk_grid, (state,), inputs.operands(), (TokenOperand(inputs.v),)
    )
    return out, final


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    factors: Float[Array, "K2 F2"],
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    *gates: Float[Array, "2 C"],
) -> tuple[Matrices, Matrices]:
    """Return the state [F, V] after a chunk and the chunk's sums [C, V]."""
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
    """Return the gradients of the state before a chunk and of q, k and v; backward in time."""

    def forward(state: Array, q: Array, k: Array, v: Array) -> tuple[Matrices, Matrices]:
        return _chunk(dtype, (state,), factors, q, k, v, *gates)

    _, pull = jax.vjp(forward, state, q, k, v)
    state_grad, *token_grads = pull((states, (grad,)))
    return (state_grad,), tuple(token_grads)


type _TaylorResiduals = tuple[_TaylorOperands, Float[Array, "B H N F V"]]


def _forward(
    chunk_grid: ChunkGrid, inputs: _TaylorOperands, state: Array
) -> tuple[tuple[Array, Array], _TaylorResiduals]:
    body = functools.partial(_chunk, inputs.v.dtype)
    (final,), out, (states,) = chunk_scan_saving_states(
        "taylor_attention_forward", body, chunk_grid, (state,), inputs.operands(), TokenOperand(inputs.v)
    )
    return (out, final), (inputs, states)


def _backward(
    chunk_grid: ChunkGrid, residuals: _TaylorResiduals, grads: tuple[Array, Array]
) -> tuple[_TaylorOperands, Array]:
    inputs, states = residuals
    grad, state_grad = grads
    (initial_grad,), (dq, dk, dv) = chunk_scan(
        "taylor_attention_backward",
        functools.partial(_backward_chunk, inputs.v.dtype),
        chunk_grid._replace(reverse=True),
        (state_grad,),
        (TokenOperand(grad), PerChunkOperand(states), *inputs.operands()),
        tuple(TokenOperand(x) for x in (inputs.q, inputs.k, inputs.v)),
    )
    decay_grad = None if inputs.log_decay is None else jnp.zeros_like(inputs.log_decay)
    return _TaylorOperands(dq, dk, dv, decay_grad), initial_grad


_core.defvjp(_forward, _backward)
