"""Linear memory with gradients per token on TPUs: a chunk scan with weights and momentum in VMEM.

    (I + G- * K K^T) U = beta- K W + f- K S - V          gradients of all tokens of a chunk, by one triangular system
    Y = beta Q W + f Q S - (G * Q K^T) U                 the suffix - marks coefficients of the previous token

The contribution of the initial weights is linear and computed outside (`sequential_memory.py`). The forward pass saves
the states at the start of each chunk; the backward pass scans the chunks in reverse and differentiates the same body.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import (
    ChunkGrid,
    head_major,
    make_chunk_grid,
    require_uniform_dtype,
    split_chunks,
    time_major,
)
from recallax.pallas_kernels.mosaic_tpu.chunk_operands import ChunkOperand, PerChunkOperand, TokenOperand, output_shape
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import Matrices, chunk_scan, chunk_scan_saving_states, vjp_body
from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_nt, dot_tn
from recallax.pallas_kernels.mosaic_tpu.solve_unit_lower import solve_unit_lower
from recallax.pallas_kernels.neural_memory.reference import NeuralMemoryArgs
from recallax.pallas_kernels.neural_memory.sequential_memory import require_sequential, subtract_initial_weights
from recallax.pallas_kernels.neural_memory.update_coefficients import FastWeights

CHUNK = 64
"""Tokens of a chunk."""


def neural_memory(args: NeuralMemoryArgs) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """Compute the linear memory with gradients per token on a TPU.

    Queries, keys and values are float32 or bfloat16.

    The arguments and the result are those of `neural_memory.reference.neural_memory`.

    Raises:
        Unsupported: The kernel does not support the options or dtypes, or there is no TPU.
    """
    inner_optimizer, outer_params, tokens, document_ids, fast_weights = args
    require_sequential(inner_optimizer, outer_params)
    (name,), (q, k, v) = fast_weights.delta, tokens[:3]
    require_uniform_dtype(q=q, k=k, v=v)
    length = q.shape[1]
    chunk_grid = make_chunk_grid(CHUNK, length, v, v.shape[2])
    lr = jnp.where(document_ids.valid[..., None, None], tokens.lr.astype(jnp.float32), 0)
    starts = document_ids.index != jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    origin = outer_params.initial_weights[name].astype(jnp.float32)
    keep = jnp.where(document_ids.valid[..., None, None], tokens.log_decay.astype(jnp.float32), 0)
    weight_factor = jnp.exp(keep) if inner_optimizer.gradient == "token_decayed" else jnp.ones_like(keep)
    v, read, final_term = subtract_initial_weights(inner_optimizer, origin, q, k, v, keep, starts)

    def row(x: Float[Array, "B T H 1"]) -> Float[Array, "B H N 1 C"]:
        return split_chunks(head_major(x, chunk_grid)[..., 0], chunk_grid)[:, :, :, None]

    def rows(log: Float[Array, "B T H 1"]) -> Float[Array, "B H N 2 C"]:
        gate = decays.document_log_decay(log, document_ids, v.shape[2])
        assert gate is not None
        return decays.running_sums(split_chunks(head_major(gate, chunk_grid)[..., 0], chunk_grid))

    valid = jnp.broadcast_to(document_ids.valid[..., None, None], keep.shape).astype(jnp.float32)
    decay_rows = rows(tokens.log_decay)
    previous_rows = jnp.pad(decay_rows[..., :-1], [(0, 0)] * 4 + [(1, 0)])
    inputs = _NeuralMemoryOperands(
        *(head_major(x, chunk_grid) for x in (q, k, v)),
        lr=row(lr),
        previous_weight_factor=row(jnp.where(starts[..., None, None], 0, weight_factor)),
        log_decay=jnp.concatenate([decay_rows, previous_rows], axis=3),
        momentum=jnp.concatenate([rows(tokens.log_momentum), row(valid)], axis=3) if inner_optimizer.momentum else None,
    )
    states = (fast_weights.delta[name], *fast_weights.momentum.values())
    out, after = _core(chunk_grid, inputs, states)
    out = (time_major(out, length) + read).astype(tokens.q.dtype)
    momentum = {name: after[1]} if inner_optimizer.momentum else {}
    return out, FastWeights({name: after[0] + final_term}, momentum)


class _NeuralMemoryOperands(NamedTuple):
    """Head-major arrays of whole chunks."""

    q: Float[Array, "B H T I"]
    k: Float[Array, "B H T I"]
    v: Float[Array, "B H T O"]
    lr: Float[Array, "B H N 1 C"]
    previous_weight_factor: Float[Array, "B H N 1 C"]
    """Factor of the previous token's weights at which the gradient is computed; 0 where a document starts."""
    log_decay: Float[Array, "B H N 4 C"]
    """Running sums of the log of keep, up to the token and up to the previous token."""
    momentum: Float[Array, "B H N 3 C"] | None
    """Running sums of the log of the momentum factor, and a row that is 1 at valid tokens and 0 at padding."""

    def operands(self) -> list[ChunkOperand]:
        return [PerChunkOperand(x) if x.ndim == 5 else TokenOperand(x) for x in self if x is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid, inputs: _NeuralMemoryOperands, states: Matrices
) -> tuple[Float[Array, "B H T O"], Matrices]:
    body = functools.partial(_chunk, inputs.v.dtype)
    output = TokenOperand(output_shape(*inputs.v.shape))
    after, (out,) = chunk_scan("neural_memory_forward", body, chunk_grid, states, inputs.operands(), (output,))
    return out, after


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    q: Float[Array, "C I"],
    k: Float[Array, "C I"],
    v: Float[Array, "C O"],
    lr: Float[Array, "1 C"],
    previous_weight_factor: Float[Array, "1 C"],
    keep: Float[Array, "4 C"],
    *momentum: Float[Array, "3 C"],
) -> tuple[Matrices, Matrices]:
    """Return the states [I, O] after a chunk and the chunk's output [C, O]."""
    length, width = v.shape
    spread = functools.partial(decays.broadcast_column, width=width)
    now, before = _pairwise_decay(keep[:2], keep[:2], 0), _pairwise_decay(keep[2:], keep[:2], 1)
    pushes = moves = since_start = None
    if momentum:
        pushes = _pairwise_decay(momentum[0][:2], momentum[0][:2], 0)
        moving = decays.broadcast_column(momentum[0][2:], length)
        weights, earlier = (dot(x, moving * pushes, jnp.float32) * lr for x in (now, before))
        since_start = jnp.exp(momentum[0][:1] + momentum[0][1:2])
        moves = since_start * momentum[0][2:]
    else:
        weights, earlier = now * lr, before * lr

    def times_carried(x: Array, pairs: Array, sums: Float[Array, "2 C"]) -> Array:
        """Multiply x by the contribution of the carried states to the weights of each token."""
        from_weights = spread(jnp.exp(sums[:1] + sums[1:])) * dot(x, states[0], dtype)
        if moves is None:
            return from_weights
        return from_weights + spread(dot_nt(moves, pairs, jnp.float32)) * dot(x, states[1], dtype)

    system = earlier * dot_nt(k, k, dtype) * decays.broadcast_column(previous_weight_factor, length)
    grads = solve_unit_lower(system, spread(previous_weight_factor) * times_carried(k, before, keep[2:]) - v)
    out = times_carried(q, now, keep[:2]) - dot(weights * dot_nt(q, k, dtype), grads, dtype)

    end = slice(length - 1, length)
    total_keep = jnp.exp(keep[:1, end] + keep[1:2, end])
    delta = total_keep * states[0] - dot_tn(k * decays.broadcast_column(weights[end], k.shape[1]), grads, dtype)
    if moves is None or pushes is None or since_start is None:
        return (delta,), (out,)
    delta = delta + dot_nt(moves, now[end], jnp.float32) * states[1]
    push = dot_tn(k * decays.broadcast_column(pushes[end] * lr, k.shape[1]), grads, dtype)
    return (delta, since_start[:, end] * states[1] - push), (out,)


def _pairwise_decay(late: Float[Array, "2 C"], early: Float[Array, "2 C"], min_distance: int) -> Float[Array, "C C"]:
    """Decay from token j (exclusive) to token i, for i >= j + min_distance; 0 elsewhere."""
    length = late.shape[1]
    late, early = (jnp.concatenate([jax.lax.stop_gradient(x[:1]), x[1:]]) for x in (late, early))
    log_decay = (decays.broadcast_column(late[:1], length) - early[:1]) + (
        decays.broadcast_column(late[1:], length) - early[1:]
    )
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return jnp.exp(jnp.where(i >= j + min_distance, log_decay, -jnp.inf))


def _forward(
    chunk_grid: ChunkGrid, inputs: _NeuralMemoryOperands, states: Matrices
) -> tuple[tuple[Array, Matrices], tuple[_NeuralMemoryOperands, Matrices]]:
    body = functools.partial(_chunk, inputs.v.dtype)
    output = TokenOperand(output_shape(*inputs.v.shape))
    after, out, before = chunk_scan_saving_states(
        "neural_memory_forward", body, chunk_grid, states, inputs.operands(), output
    )
    return (out, after), (inputs, before)


def _backward(
    chunk_grid: ChunkGrid, residuals: tuple[_NeuralMemoryOperands, Matrices], grads: tuple[Array, Matrices]
) -> tuple[_NeuralMemoryOperands, Matrices]:
    inputs, before = residuals
    grad, state_grads = grads
    operands, reverse = inputs.operands(), chunk_grid._replace(reverse=True)
    body = vjp_body(functools.partial(_chunk, inputs.v.dtype))
    residual_operands = (TokenOperand(grad), *(PerChunkOperand(x) for x in before))
    initial_grads, results = chunk_scan(
        "neural_memory_backward", body, reverse, state_grads, (*residual_operands, *operands), operands
    )
    return _NeuralMemoryOperands(*results, *([None] if inputs.momentum is None else [])), initial_grads


_core.defvjp(_forward, _backward)
