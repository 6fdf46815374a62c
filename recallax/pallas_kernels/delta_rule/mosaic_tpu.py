"""Gated delta rule on TPUs: a scan over the chunks of `xla.py`, with the triangular system solved in VMEM.

    U = (I + A)^{-1} (w V - D(E) S)

is solved for one right-hand side when the state is known. The forward pass saves the state at the start of each chunk.
The backward pass scans the chunks in reverse and differentiates the same body, so it recomputes each chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels.delta_rule.reference import DeltaRuleArgs
from recallax.pallas_kernels.mosaic_tpu import token_decay as decays
from recallax.pallas_kernels.mosaic_tpu.blockwise_channel_decay import chunk_decay
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
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import Matrices, chunk_scan, chunk_scan_saving_states, vjp_body
from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_tn
from recallax.pallas_kernels.mosaic_tpu.solve_unit_lower import solve_unit_lower

CHUNK = 64
"""Tokens of a chunk."""


def delta_rule(args: DeltaRuleArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute the gated delta rule on a TPU.

    The arguments and the result are those of `delta_rule.reference.delta_rule`.

    Raises:
        Unsupported: The dtypes differ or there is no TPU.
    """
    q, k, v, erase, write, log_decay, state, document_ids, scale = args
    length = q.shape[1]
    chunk_grid = make_chunk_grid(CHUNK, length, v, q.shape[2])
    require_uniform_dtype(q=q, k=k, v=v)
    if document_ids is not None:
        # Padding neither erases nor writes.
        k = jnp.where(document_ids.valid[..., None, None], k, jnp.zeros((), k.dtype))
    gate = decays.document_log_decay(log_decay, document_ids, v.shape[2])
    gate = None if gate is None else head_major(gate, chunk_grid)
    if gate is not None and gate.shape[-1] == 1:
        gate = decays.running_sums(split_chunks(gate[..., 0], chunk_grid))
    erase, write = (head_major(x.astype(jnp.float32), chunk_grid) for x in (erase, write))
    erase_row, write = (split_chunks(x[..., 0], chunk_grid)[:, :, :, None] for x in (erase, write))
    q, k, v = (head_major(x, chunk_grid) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    inputs = _DeltaRuleOperands(q, k, v, erase_row if erase.shape[-1] == 1 else erase, write, gate)
    out, final = _core(chunk_grid, inputs, state)
    return time_major(out, length), final


class _DeltaRuleOperands(NamedTuple):
    """Head-major arrays of whole chunks."""

    q: Float[Array, "B G T K"]
    k: Float[Array, "B G T K"]
    v: Float[Array, "B H T V"]
    erase: Float[Array, "B H N 1 C"] | Float[Array, "B H T K"]
    write: Float[Array, "B H N 1 C"]
    log_decay: Float[Array, "B H N 2 C"] | Float[Array, "B H T K"] | None
    """Running sums of the log-decay per token, or the log-decay per channel; includes the document boundaries."""

    def operands(self) -> list[ChunkOperand]:
        return [PerChunkOperand(x) if x.ndim == 5 else TokenOperand(x) for x in self if x is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid, inputs: _DeltaRuleOperands, state: Float[Array, "B H K V"]
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H K V"]]:
    body = functools.partial(_chunk, inputs.v.dtype)
    (final,), (out,) = chunk_scan(
        "delta_rule_forward", body, chunk_grid, (state,), inputs.operands(), (TokenOperand(inputs.v),)
    )
    return out, final


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    erase: Float[Array, "1 C"] | Float[Array, "C K"],
    write: Float[Array, "1 C"],
    *gates: Float[Array, "2 C"] | Float[Array, "C K"],
) -> tuple[Matrices, Matrices]:
    """Return the state [K, V] after a chunk and the chunk's output [C, V]."""
    (state,) = states
    decay = chunk_decay(gates, *q.shape)
    # A strength per token scales rows of the float32 products, so that the keys are not rounded once more.
    per_token = erase.shape[0] == 1
    erase_k = k if per_token else k * erase
    scores = decay.scores(erase_k, k, dtype)
    erased = dot(decays.scale_by_decay(erase_k, decay.decay_from_start), state, dtype)
    if per_token:
        scores, erased = (x * decays.broadcast_column(erase, x.shape[1]) for x in (scores, erased))
    new = solve_unit_lower(scores, v * decays.broadcast_column(write, v.shape[1]) - erased)
    out = dot(decays.scale_by_decay(q, decay.decay_from_start), state, dtype) + dot(
        decay.scores(q, k, dtype), new, dtype
    )
    written = dot_tn(decays.scale_by_decay(k, decay.decay_to_end), new, dtype)
    return (decays.scale_by_decay(state, decay.total_decay) + written,), (out,)


def _forward(
    chunk_grid: ChunkGrid, inputs: _DeltaRuleOperands, state: Array
) -> tuple[tuple[Array, Array], tuple[_DeltaRuleOperands, Float[Array, "B H N K V"]]]:
    body = functools.partial(_chunk, inputs.v.dtype)
    (final,), out, (states,) = chunk_scan_saving_states(
        "delta_rule_forward", body, chunk_grid, (state,), inputs.operands(), TokenOperand(inputs.v)
    )
    return (out, final), (inputs, states)


def _backward(
    chunk_grid: ChunkGrid, residuals: tuple[_DeltaRuleOperands, Array], grads: tuple[Array, Array]
) -> tuple[_DeltaRuleOperands, Float[Array, "B H K V"]]:
    inputs, states = residuals
    grad, state_grad = grads
    q, dtype, operands = inputs.q, inputs.v.dtype, inputs.operands()
    # One gradient per value head; those that share a key head are summed outside the kernel, in float32.
    heads = inputs.v.shape[1]
    per_v_head = TokenOperand(
        output_shape(q.shape[0], heads, *q.shape[2:], dtype=q.dtype if q.shape[1] == heads else jnp.float32)
    )
    reverse = chunk_grid._replace(reverse=True)
    body = vjp_body(functools.partial(_chunk, dtype))
    (initial_grad,), results = chunk_scan(
        "delta_rule_backward",
        body,
        reverse,
        (state_grad,),
        (TokenOperand(grad), PerChunkOperand(states), *operands),
        (per_v_head, per_v_head, *operands[2:]),
    )
    dq, dk, dv, erase, write, *gate = results
    dq, dk = (sum_per_group(x, q.shape[1]).astype(q.dtype) for x in (dq, dk))
    return _DeltaRuleOperands(dq, dk, dv, erase, write, gate[0] if gate else None), initial_grad


_core.defvjp(_forward, _backward)
