"""The linear memory with a gradient per token on TPUs: `xla.py`'s exact chunks, with weights and momentum in VMEM.

    (I + G- * K K^T) U = beta- K W + f- K S - V          slopes of all tokens of a chunk, by one triangular system
    Y = beta Q W + f Q S - (G * Q K^T) U                 the minus sign: as the token before sees it

What the initial weights add is linear in them and stands outside (`exact.py`). The forward pass keeps the states at
each chunk's start; the backward pass walks the chunks in reverse and differentiates the same body.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import (
    ChunkGrid,
    ChunkOperand,
    Matrices,
    PerChunkOperand,
    TokenOperand,
    chunk_scan,
    dot,
    dot_nt,
    dot_tn,
    head_major,
    make_chunk_grid,
    output_shape,
    require_uniform_dtype,
    save_states,
    split_chunks,
    time_major,
    vjp_body,
)
from recallax.pallas_kernels.mosaic_tpu.solve_unit_lower import solve_unit_lower
from recallax.pallas_kernels.neural_memory import update_coefficients
from recallax.pallas_kernels.neural_memory.inner_optimizer import InnerOptimizer
from recallax.pallas_kernels.neural_memory.sequential_memory import require_sequential, subtract_initial_weights
from recallax.pallas_kernels.neural_memory.update_coefficients import FastWeights, OuterParams

CHUNK = 64


def neural_memory(
    inner_optimizer: InnerOptimizer,
    outer_params: OuterParams,
    tokens: update_coefficients.MemoryInputs,
    document_ids: DocumentIds,
    fast_weights: FastWeights,
) -> tuple[Float[Array, "B M H D"], FastWeights]:
    """The op's form for TPUs, of float32 or bfloat16 queries, keys and values."""
    require_sequential(inner_optimizer, outer_params)
    (name,), (q, k, v) = fast_weights.delta, tokens[:3]
    require_uniform_dtype(q=q, k=k, v=v)
    length = q.shape[1]
    steps = make_chunk_grid(CHUNK, length, v, v.shape[2])
    lr = jnp.where(document_ids.valid[..., None, None], tokens.lr.astype(jnp.float32), 0)
    starts = document_ids.index != jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
    origin = outer_params.initial_weights[name].astype(jnp.float32)
    keep = jnp.where(document_ids.valid[..., None, None], tokens.log_decay.astype(jnp.float32), 0)
    seen = jnp.exp(keep) if inner_optimizer.gradient == "token_decayed" else jnp.ones_like(keep)
    v, read, left = subtract_initial_weights(inner_optimizer, origin, q, k, v, keep, starts)

    def row(x: Float[Array, "B T H 1"]) -> Float[Array, "B H N 1 C"]:
        return split_chunks(head_major(x, steps)[..., 0], steps)[:, :, :, None]

    def rows(log: Float[Array, "B T H 1"]) -> Float[Array, "B H N 2 C"]:
        gate = decays.document_log_decay(log, document_ids, v.shape[2])
        assert gate is not None
        return decays.running_sums(split_chunks(head_major(gate, steps)[..., 0], steps))

    moves = jnp.broadcast_to(document_ids.valid[..., None, None], keep.shape).astype(jnp.float32)
    kept = rows(tokens.log_decay)
    before = jnp.pad(kept[..., :-1], [(0, 0)] * 4 + [(1, 0)])
    inputs = _NeuralMemoryOperands(
        *(head_major(x, steps) for x in (q, k, v)),
        lr=row(lr),
        previous_weight_factor=row(jnp.where(starts[..., None, None], 0, seen)),
        log_decay=jnp.concatenate([kept, before], axis=3),
        momentum=jnp.concatenate([rows(tokens.log_momentum), row(moves)], axis=3) if inner_optimizer.momentum else None,
    )
    states = (fast_weights.delta[name], *fast_weights.momentum.values())
    out, after = _core(steps, inputs, states)
    out = (time_major(out, length) + read).astype(tokens.q.dtype)
    momentum = {name: after[1]} if inner_optimizer.momentum else {}
    return out, FastWeights({name: after[0] + left}, momentum)


class _NeuralMemoryOperands(NamedTuple):
    """Of whole chunks, head-major."""

    q: Float[Array, "B H T I"]
    k: Float[Array, "B H T I"]
    v: Float[Array, "B H T O"]
    lr: Float[Array, "B H N 1 C"]
    previous_weight_factor: Float[Array, "B H N 1 C"]
    """How much of the weights after the token before a token's gradient sees: 0 where its document starts."""
    log_decay: Float[Array, "B H N 4 C"]
    """Running sums of the log of keep; and the same up to the token before."""
    momentum: Float[Array, "B H N 3 C"] | None
    """Running sums of its log; and 1 where the momentum moves the weights, 0 at padding."""

    def operands(self) -> list[ChunkOperand]:
        return [PerChunkOperand(x) if x.ndim == 5 else TokenOperand(x) for x in self if x is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid, inputs: _NeuralMemoryOperands, states: Matrices
) -> tuple[Float[Array, "B H T O"], Matrices]:
    body = functools.partial(_chunk, inputs.v.dtype)
    made = TokenOperand(output_shape(*inputs.v.shape))
    after, (out,) = chunk_scan("neural_memory_forward", body, chunk_grid, states, inputs.operands(), (made,))
    return out, after


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    q: Float[Array, "C I"],
    k: Float[Array, "C I"],
    v: Float[Array, "C O"],
    lr: Float[Array, "1 C"],
    seen: Float[Array, "1 C"],
    keep: Float[Array, "4 C"],
    *momentum: Float[Array, "3 C"],
) -> tuple[Matrices, Matrices]:
    """The states [I, O] after a chunk and the chunk's output [C, O]."""
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

    def found(x: Array, pairs: Array, sums: Float[Array, "2 C"]) -> Array:
        """x times what is left of the states that the chunk found."""
        left = spread(jnp.exp(sums[:1] + sums[1:])) * dot(x, states[0], dtype)
        if moves is None:
            return left
        return left + spread(dot_nt(moves, pairs, jnp.float32)) * dot(x, states[1], dtype)

    system = earlier * dot_nt(k, k, dtype) * decays.broadcast_column(seen, length)
    slopes = solve_unit_lower(system, spread(seen) * found(k, before, keep[2:]) - v)
    out = found(q, now, keep[:2]) - dot(weights * dot_nt(q, k, dtype), slopes, dtype)

    end = slice(length - 1, length)
    left = jnp.exp(keep[:1, end] + keep[1:2, end])
    change = left * states[0] - dot_tn(k * decays.broadcast_column(weights[end], k.shape[1]), slopes, dtype)
    if moves is None or pushes is None or since_start is None:
        return (change,), (out,)
    change = change + dot_nt(moves, now[end], jnp.float32) * states[1]
    push = dot_tn(k * decays.broadcast_column(pushes[end] * lr, k.shape[1]), slopes, dtype)
    return (change, since_start[:, end] * states[1] - push), (out,)


def _pairwise_decay(late: Float[Array, "2 C"], early: Float[Array, "2 C"], apart: int) -> Float[Array, "C C"]:
    """exp of the sum of logs behind token j up to token i, for i >= j + apart; 0 elsewhere."""
    length = late.shape[1]
    late, early = (jnp.concatenate([jax.lax.stop_gradient(x[:1]), x[1:]]) for x in (late, early))
    gaps = (decays.broadcast_column(late[:1], length) - early[:1]) + (
        decays.broadcast_column(late[1:], length) - early[1:]
    )
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return jnp.exp(jnp.where(i >= j + apart, gaps, -jnp.inf))


def _forward(
    chunk_grid: ChunkGrid, inputs: _NeuralMemoryOperands, states: Matrices
) -> tuple[tuple[Array, Matrices], tuple[_NeuralMemoryOperands, Matrices]]:
    body = save_states(functools.partial(_chunk, inputs.v.dtype))
    kept = [PerChunkOperand(output_shape(*x.shape[:2], chunk_grid.num_chunks, *x.shape[2:])) for x in states]
    made = (TokenOperand(output_shape(*inputs.v.shape)), *kept)
    after, (out, *before) = chunk_scan("neural_memory_forward", body, chunk_grid, states, inputs.operands(), made)
    return (out, after), (inputs, tuple(before))


def _backward(
    chunk_grid: ChunkGrid, residuals: tuple[_NeuralMemoryOperands, Matrices], grads: tuple[Array, Matrices]
) -> tuple[_NeuralMemoryOperands, Matrices]:
    inputs, before = residuals
    slope, late = grads
    given, reverse = inputs.operands(), chunk_grid._replace(reverse=True)
    body = vjp_body(functools.partial(_chunk, inputs.v.dtype))
    known = (TokenOperand(slope), *(PerChunkOperand(x) for x in before))
    early, results = chunk_scan("neural_memory_backward", body, reverse, late, (*known, *given), given)
    return _NeuralMemoryOperands(*results, *([None] if inputs.momentum is None else [])), early


_core.defvjp(_forward, _backward)
