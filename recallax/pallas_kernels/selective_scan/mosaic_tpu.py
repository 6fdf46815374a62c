"""Element-wise gated recurrence on TPUs: channels along lanes, states along sublanes, sequential over tokens.

Besides inputs and outputs only one state per chunk is stored, for the backward pass, which recomputes each chunk. B, C
and the document boundaries are the same for all channels and share one array: separately each would be padded to 128
lanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import require_platform
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import LANES, ChunkGrid, chunk_size_and_count, require_uniform_dtype
from recallax.pallas_kernels.mosaic_tpu.chunk_operands import (
    ChannelOperand,
    ChunkOperand,
    PerChunkOperand,
    PerHeadOperand,
    TokenOperand,
    output_shape,
)
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import Matrices, chunk_scan, chunk_scan_saving_states
from recallax.pallas_kernels.selective_scan.reference import SelectiveScanArgs

CHUNK = 64
"""Tokens of a chunk."""
MAX_LANES = 512
"""Upper bound of the channels of a grid step: independent recurrences, which hide each other's latency."""


def selective_scan(args: SelectiveScanArgs) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Compute the recurrence on a TPU.

    The arguments and the result are those of `selective_scan.reference.selective_scan`.

    Raises:
        Unsupported: x has another dtype or there is no TPU.
    """
    x, rate, a, b, c, state, document_ids = args
    require_platform("tpu")
    require_uniform_dtype(x=x)
    rows, length, channels = x.shape
    lanes = min(MAX_LANES, -(-channels // LANES) * LANES)
    heads = -(-channels // lanes)
    chunk_grid = ChunkGrid(rows, heads, 1, *chunk_size_and_count(CHUNK, length))
    packed_bc = jnp.concatenate([b.astype(jnp.float32), c.astype(jnp.float32)], axis=-1)
    if document_ids is not None:
        # Padding neither decays nor writes; the first token of a document resets the state.
        valid = document_ids.valid[..., None]
        x, rate = (jnp.where(valid, part, jnp.zeros((), part.dtype)) for part in (x, rate))
        previous = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
        starts = (document_ids.index != previous).astype(jnp.float32)[..., None]
        packed_bc = jnp.concatenate([packed_bc, starts], axis=-1)
    padding = ((0, 0), (0, chunk_grid.padded_length - length), (0, heads * lanes - channels))
    x, rate = jnp.pad(x, padding), jnp.pad(rate.astype(jnp.float32), padding)
    packed_bc = jnp.pad(packed_bc, (*padding[:2], (0, 0)))

    def lane_groups(part: Float[Array, "R D N"]) -> Float[Array, "R H N L"]:
        padded = jnp.pad(part.astype(jnp.float32), ((0, 0), (0, padding[2][1]), (0, 0)))
        return jnp.moveaxis(padded.reshape(part.shape[0], heads, lanes, -1), 2, 3)

    inputs = _SelectiveScanOperands(lane_groups(a[None])[0], x, rate, packed_bc[:, None])
    out, final = _core(chunk_grid, inputs, lane_groups(state))
    final = jnp.moveaxis(final, 3, 2).reshape(rows, heads * lanes, -1)
    return out[:, :length, :channels], final[:, :channels]


class _SelectiveScanOperands(NamedTuple):
    """Arrays of whole chunks and whole groups of lanes; a group of L channels is a head of the grid."""

    a: Float[Array, "H N L"]
    x: Float[Array, "B T D"]
    rate: Float[Array, "B T D"]
    packed_bc: Float[Array, "B 1 T W"]
    """b, c and, with segment ids, a last column that is 1 where a document starts."""

    def operands(self) -> tuple[ChunkOperand, ...]:
        a, x, rate, packed_bc = self
        lanes = a.shape[2]
        return PerHeadOperand(a), ChannelOperand(x, lanes), ChannelOperand(rate, lanes), TokenOperand(packed_bc)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    chunk_grid: ChunkGrid, inputs: _SelectiveScanOperands, state: Float[Array, "B H N L"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B H N L"]]:
    operands = inputs.operands()
    (final,), (out,) = chunk_scan("selective_scan_forward", _chunk, chunk_grid, (state,), operands, operands[1:2])
    return out, final


def _chunk(
    states: Matrices,
    a: Float[Array, "N L"],
    x: Float[Array, "C L"],
    rate: Float[Array, "C L"],
    packed_bc: Float[Array, "C W"],
) -> tuple[Matrices, Matrices]:
    """Return the state [N, L] after a chunk and the chunk's output [C, L]."""
    (state,) = states
    num_states, columns = a.shape[0], packed_bc.T
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    out = []
    for t in range(x.shape[0]):
        # A masked sum instead of a slice: its gradient writes one lane without moving the others.
        token = jnp.sum(jnp.where(lane == t, columns, 0), axis=1, keepdims=True)
        factor = jnp.exp(rate[t : t + 1] * a)
        if columns.shape[0] > 2 * num_states:
            factor = factor * (1 - token[2 * num_states :])
        state = factor * state + x[t : t + 1] * token[:num_states]
        out.append(jnp.sum(token[num_states : 2 * num_states] * state, axis=0, keepdims=True))
    return (state,), (jnp.concatenate(out),)


def _backward_chunk(states: Matrices, grad: Array, state: Array, *inputs: Array) -> tuple[Matrices, Matrices]:
    """Return the gradients of the state before a chunk, of `a` (summed over chunks), x, rate and packed_bc."""
    state_grad, a_grad = states
    _, pull = jax.vjp(lambda state, *inputs: _chunk((state,), *inputs), state, *inputs)
    previous_grad, da, dx, drate, dbc = pull(((state_grad,), (grad,)))
    return (previous_grad, a_grad + da), (dx, drate, dbc)


def _forward(
    chunk_grid: ChunkGrid, inputs: _SelectiveScanOperands, state: Array
) -> tuple[tuple[Array, Array], tuple[_SelectiveScanOperands, Float[Array, "B H J N L"]]]:
    operands = inputs.operands()
    (final,), out, (states,) = chunk_scan_saving_states(
        "selective_scan_forward", _chunk, chunk_grid, (state,), operands, operands[1]
    )
    return (out, final), (inputs, states)


def _backward(
    chunk_grid: ChunkGrid, residuals: tuple[_SelectiveScanOperands, Array], grads: tuple[Array, Array]
) -> tuple[_SelectiveScanOperands, Float[Array, "B H N L"]]:
    inputs, states = residuals
    grad, state_grad = grads
    operands = inputs.operands()
    # One gradient of packed_bc per group of channels.
    dbc_output = TokenOperand(output_shape(*state_grad.shape[:2], *inputs.packed_bc.shape[2:]))
    (initial_grad, da), (dx, drate, dbc) = chunk_scan(
        "selective_scan_backward",
        _backward_chunk,
        chunk_grid._replace(reverse=True),
        (state_grad, jnp.zeros_like(state_grad)),
        (ChannelOperand(grad, inputs.a.shape[2]), PerChunkOperand(states), *operands),
        (*operands[1:3], dbc_output),
    )
    dbc = jnp.sum(dbc, axis=1, keepdims=True)
    return _SelectiveScanOperands(jnp.sum(da, axis=0), dx, drate, dbc), initial_grad


_core.defvjp(_forward, _backward)
