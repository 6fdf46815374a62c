"""The element-wise gated recurrence on TPUs: channels on the lanes, states on the sublanes, token after token.

Nothing but its inputs and outputs crosses memory, and a state per chunk for the backward pass, which walks each chunk
again. B, C and the borders of documents are the same for all channels and share one array: alone each would be padded
to 128 lanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import require_platform
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import (
    ChannelOperand,
    ChunkGrid,
    ChunkOperand,
    Matrices,
    PerChunkOperand,
    PerHeadOperand,
    TokenOperand,
    chunk_scan,
    chunk_size_and_count,
    output_shape,
    require_uniform_dtype,
    save_states,
)

CHUNK = 64
MAX_LANES = 512
"""Channels of a grid step at most: independent recurrences, which hide each other's latency."""


def selective_scan(
    x: Float[Array, "B T D"],
    rate: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    state: Float[Array, "B D N"],
    document_ids: DocumentIds | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The op's form for TPUs; x is float32 or bfloat16."""
    require_platform("tpu")
    require_uniform_dtype(x=x)
    rows, length, channels = x.shape
    lanes = min(MAX_LANES, -(-channels // 128) * 128)
    heads = -(-channels // lanes)
    steps = ChunkGrid(rows, heads, 1, *chunk_size_and_count(CHUNK, length))
    mix = jnp.concatenate([b.astype(jnp.float32), c.astype(jnp.float32)], axis=-1)
    if (
        document_ids is not None
    ):  # padding keeps its state and does not write; a document's first token drops what was before
        valid = document_ids.valid[..., None]
        x, rate = (jnp.where(valid, part, jnp.zeros((), part.dtype)) for part in (x, rate))
        before = jnp.pad(document_ids.index[:, :-1], ((0, 0), (1, 0)))
        mix = jnp.concatenate([mix, (document_ids.index != before).astype(jnp.float32)[..., None]], axis=-1)
    wide = ((0, 0), (0, steps.padded_length - length), (0, heads * lanes - channels))
    x, rate = jnp.pad(x, wide), jnp.pad(rate.astype(jnp.float32), wide)
    mix = jnp.pad(mix, (*wide[:2], (0, 0)))

    def by_block(part: Float[Array, "R D N"]) -> Float[Array, "R H N L"]:
        padded = jnp.pad(part.astype(jnp.float32), ((0, 0), (0, wide[2][1]), (0, 0)))
        return jnp.moveaxis(padded.reshape(part.shape[0], heads, lanes, -1), 2, 3)

    out, final = _core(steps, _SelectiveScanOperands(by_block(a[None])[0], x, rate, mix[:, None]), by_block(state))
    final = jnp.moveaxis(final, 3, 2).reshape(rows, heads * lanes, -1)
    return out[:, :length, :channels], final[:, :channels]


class _SelectiveScanOperands(NamedTuple):
    """Of whole chunks and whole blocks of lanes."""

    a: Float[Array, "H N L"]
    x: Float[Array, "B T D"]
    rate: Float[Array, "B T D"]
    packed_bc: Float[Array, "B 1 T W"]
    """b, c and, with documents, 1 where one starts."""

    def operands(self) -> tuple[ChunkOperand, ...]:
        a, x, rate, mix = self
        lanes = a.shape[2]
        return PerHeadOperand(a), ChannelOperand(x, lanes), ChannelOperand(rate, lanes), TokenOperand(mix)


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
    mix: Float[Array, "C W"],
) -> tuple[Matrices, Matrices]:
    """The state [N, L] after a chunk and the chunk's output [C, L]."""
    (state,) = states
    count, columns = a.shape[0], mix.T
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    out = []
    for t in range(x.shape[0]):
        # A sum over one lane, since its gradient puts the slope into that lane without moving the others.
        token = jnp.sum(jnp.where(lane == t, columns, 0), axis=1, keepdims=True)
        kept = jnp.exp(rate[t : t + 1] * a)
        if columns.shape[0] > 2 * count:
            kept = kept * (1 - token[2 * count :])
        state = kept * state + x[t : t + 1] * token[:count]
        out.append(jnp.sum(token[count : 2 * count] * state, axis=0, keepdims=True))
    return (state,), (jnp.concatenate(out),)


def _backward_chunk(states: Matrices, grad: Array, state: Array, *inputs: Array) -> tuple[Matrices, Matrices]:
    """The slopes of the state before a chunk and of a (summed so far), of x, rate and mix; backward in time."""
    late, summed = states
    _, pull = jax.vjp(lambda state, *inputs: _chunk((state,), *inputs), state, *inputs)
    early, da, dx, drate, dmix = pull(((late,), (grad,)))
    return (early, summed + da), (dx, drate, dmix)


def _forward(
    chunk_grid: ChunkGrid, inputs: _SelectiveScanOperands, state: Array
) -> tuple[tuple[Array, Array], tuple[_SelectiveScanOperands, Float[Array, "B H J N L"]]]:
    operands = inputs.operands()
    kept = PerChunkOperand(output_shape(*state.shape[:2], chunk_grid.num_chunks, *state.shape[2:]))
    (final,), (out, states) = chunk_scan(
        "selective_scan_forward", save_states(_chunk), chunk_grid, (state,), operands, (*operands[1:2], kept)
    )
    return (out, final), (inputs, states)


def _backward(
    chunk_grid: ChunkGrid, residuals: tuple[_SelectiveScanOperands, Array], grads: tuple[Array, Array]
) -> tuple[_SelectiveScanOperands, Float[Array, "B H N L"]]:
    inputs, states = residuals
    slope, late = grads
    operands = inputs.operands()
    mix = TokenOperand(
        output_shape(late.shape[0], late.shape[1], *inputs.packed_bc.shape[2:])
    )  # one per block of channels
    (early, da), (dx, drate, dmix) = chunk_scan(
        "selective_scan_backward",
        _backward_chunk,
        chunk_grid._replace(reverse=True),
        (late, jnp.zeros_like(late)),
        (ChannelOperand(slope, inputs.a.shape[2]), PerChunkOperand(states), *operands),
        (*operands[1:3], mix),
    )
    return _SelectiveScanOperands(jnp.sum(da, axis=0), dx, drate, jnp.sum(dmix, axis=1, keepdims=True)), early


_core.defvjp(_forward, _backward)
