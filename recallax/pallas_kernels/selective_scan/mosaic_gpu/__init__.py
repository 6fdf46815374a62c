"""The element-wise gated recurrence on Hopper: 64 channels in the registers of a block, token after token.

A channel's states lie along a row of a register matrix, so that what belongs to a channel is a vector along the rows,
and B and C are vectors along the columns. Nothing but inputs and outputs crosses memory, and for the backward pass a
state every 16 tokens, from which it walks those tokens again. States are filled up to a multiple of eight, which the
layout needs: with one state per channel, seven of eight that are computed are zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import LOG2E
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    LaunchConfig,
    merge_rows,
    propagate_split_states,
    split_rows,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    WGMMA,
    WGMMA_COL,
    WGMMA_ROW,
    broadcast_per_column,
    broadcast_per_row,
    copy_smem_to_gmem,
    launch_kernel,
    zero_accumulator,
)

CHUNK = 16
"""Tokens between the states that are kept, and that TMA brings in together."""
BLOCK_CHANNELS = 64
"""Of a block."""
MAX_STATES = 32
"""Per channel at most: what 16 of them take of shared memory in the backward pass."""
MAX_RESIDENT_BLOCKS = 528
"""Of threads that an H100 has room for: four on each of 132 multiprocessors."""
MIN_TOKENS_PER_SPLIT = 512
"""Of a segment."""
NUM_PASSES = 2
"""Over a row that is cut into segments, in place of one, so fewer segments than one more would gain nothing."""
NUM_PREFETCH, NUM_PREFETCH_BWD = 3, 1
"""Chunks that TMA brings in ahead; backward two blocks share a multiprocessor's memory so."""


class _SelectiveScanInputs(NamedTuple):
    """Of whole chunks and whole blocks of channels; float32 but for x."""

    x: Float[Array, "B T D"]
    rate: Float[Array, "B T D"]
    a: Float[Array, "D N"]
    """Times log2(e)."""
    b: Float[Array, "B T N"]
    c: Float[Array, "B T N"]
    state: Float[Array, "B D N"]


def selective_scan(
    x: Float[Array, "B T D"],
    rate: Float[Array, "B T D"],
    a: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    state: Float[Array, "B D N"],
    document_ids: DocumentIds | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The op's form for Hopper; x is float32 or bfloat16, N at most 32."""
    interpret = use_interpreter("gpu")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"x is {x.dtype}; it must be float32 or bfloat16")
    (_, length, channels), states = x.shape, a.shape[1]
    if states > MAX_STATES:
        raise Unsupported(f"N is {states}; it must be at most {MAX_STATES}")
    segments = min(MAX_RESIDENT_BLOCKS // (len(x) * -(-channels // BLOCK_CHANNELS)), length // MIN_TOKENS_PER_SPLIT)
    segments = segments if segments > NUM_PASSES else 1
    extra, stays = -length % (CHUNK * segments), None
    if (
        document_ids is not None
    ):  # padding keeps its state and does not write; a document's first token drops what was before
        valid = document_ids.valid[..., None]
        x, rate = (jnp.where(valid, part, jnp.zeros((), part.dtype)) for part in (x, rate))
        stays = jnp.diff(document_ids.index, axis=1, prepend=0) == 0
        stays = jnp.pad(stays.astype(jnp.float32), ((0, 0), (0, extra)), constant_values=1.0)
        stays = jnp.repeat(stays[..., None], states + -states % 8, axis=2)  # of one token it would be too small to copy
    time, width, depth = (0, extra), (0, -channels % BLOCK_CHANNELS), (0, -states % 8)

    def wide(part, *room):
        return jnp.pad(part.astype(jnp.float32), room)

    inputs = _SelectiveScanInputs(
        jnp.pad(x, ((0, 0), time, width)),
        wide(rate, (0, 0), time, width),
        wide(a * LOG2E, width, depth),
        wide(b, (0, 0), time, depth),
        wide(c, (0, 0), time, depth),
        wide(state, (0, 0), width, depth),
    )
    out, final = _scan(LaunchConfig(1.0, segments, interpret), inputs, stays)
    return out[:, :length, :channels], final[:, :channels, :states]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(config: LaunchConfig, inputs: _SelectiveScanInputs, state_mask: Float[Array, "B T N"] | None):
    return _forward_splits(config, inputs, state_mask, save_states=False)[:2]


def _scan_fwd(config, inputs, state_mask):
    *results, kept = _forward_splits(config, inputs, state_mask, save_states=True)
    return tuple(results), (inputs, state_mask, kept)


def _scan_bwd(config, residuals, cotangents):
    (inputs, stays, (states,)), (grad, state_grad), n = residuals, cotangents, config.num_splits
    parts, own, grad = _split_inputs(inputs, n), None if stays is None else split_rows(stays, n), split_rows(grad, n)
    walked = functools.partial(_backward, config.interpret, parts, own, states, grad)
    last = _split_boundary_states(lambda state: walked(state)[-1], inputs, stays, state_grad, n, reverse=True)
    dx, drate, da, db, dc, first = walked(last)
    dx, drate, db, dc = (merge_rows(part, n) for part in (dx, drate, jnp.sum(db, axis=1), jnp.sum(dc, axis=1)))
    return _SelectiveScanInputs(dx, drate / LOG2E, jnp.sum(da, axis=0) / LOG2E, db, dc, first[::n]), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _forward_splits(config, inputs, state_mask, *, save_states):
    """`_forward` over all segments of a row at once; what is kept stays cut."""
    n, interpret = config.num_splits, config.interpret
    parts, own = _split_inputs(inputs, n), None if state_mask is None else split_rows(state_mask, n)

    def before(state):
        return _forward(interpret, parts._replace(state=state), own, save_states=False)[1]

    first = _split_boundary_states(before, inputs, state_mask, inputs.state, n, reverse=False)
    out, final, kept = _forward(interpret, parts._replace(state=first), own, save_states=save_states)
    return merge_rows(out, n), final[n - 1 :: n], kept


def _split_inputs(inputs: _SelectiveScanInputs, num_splits: int) -> _SelectiveScanInputs:
    """Every segment as a row, but for the states."""
    tokens = {name: split_rows(getattr(inputs, name), num_splits) for name in ("x", "rate", "b", "c")}
    return inputs._replace(**tokens)


def _split_boundary_states(boundary_state_fn, inputs, state_mask, state, num_splits, *, reverse):
    """The state before each segment, or its gradient behind it, by a walk that starts from empty ones."""
    if num_splits == 1:
        return state
    rates = jnp.sum(split_rows(inputs.rate, num_splits), axis=1)[..., None]
    left = jnp.exp2(rates * inputs.a[None])
    if state_mask is not None:
        left = left * jnp.min(split_rows(state_mask, num_splits), axis=1)[:, None]
    return propagate_split_states(boundary_state_fn(jnp.zeros(left.shape, state.dtype)), left, state, reverse=reverse)


def _chunk_pipeline(chunk, tokens, state_vectors, init_carry, num_chunks, *, reverse=False):
    """The last of carry = chunk(step, *blocks, carry) for all chunks.

    tokens: references [T, 64]; along: references [T, N]. A block is one warpgroup, which copies as well, so that
    several blocks fit on a multiprocessor.
    """

    def order(step):
        return num_chunks - 1 - step if reverse else step

    specs = [plgpu.BlockSpec((CHUNK, BLOCK_CHANNELS), lambda step: (order(step), 0)) for _ in tokens]
    specs += [plgpu.BlockSpec((CHUNK, x.shape[1]), lambda step: (order(step), 0)) for x in state_vectors]
    return plgpu.emit_pipeline(
        lambda index, *refs: chunk(order(index[0]), *refs),
        grid=(num_chunks,),
        in_specs=specs,
        max_concurrent_steps=1 + (NUM_PREFETCH_BWD if reverse else NUM_PREFETCH),
        init_carry=init_carry,
    )(*tokens, *state_vectors)


def _load_channel_vector(ref, t):
    """What belongs to the channels at a token."""
    return plgpu.load(ref.at[t], layout=WGMMA_ROW).astype(jnp.float32)


def _load_state_vector(ref, t, shape):
    """What belongs to the states at a token."""
    return broadcast_per_column(plgpu.load(ref.at[t], layout=WGMMA_COL), shape)


def _decay_factors(rate, a, state_mask, t):
    """The factors of a token on the states."""
    factor = jnp.exp2(broadcast_per_row(_load_channel_vector(rate, t), a.shape) * a)
    return factor * _load_state_vector(state_mask[0], t, a.shape) if state_mask else factor


def _load_matrix(ref):
    return plgpu.load(ref, layout=WGMMA, optimized=False)


def _forward(interpret, inputs, state_mask, *, save_states):
    """The output, the final state and, if wanted, the states before the chunks."""
    x, _, a, *_ = inputs
    (rows, length, channels), depth = x.shape, a.shape[1]
    count, shape = length // CHUNK, (BLOCK_CHANNELS, depth)

    def forward(x, rate, a, b, c, start, stays, out, final, kept):
        row, own = lax.axis_index("row"), pl.ds(lax.axis_index("block") * BLOCK_CHANNELS, BLOCK_CHANNELS)

        def scoped(staged):
            factors = _load_matrix(a.at[own])

            def chunk(step, x, rate, b, c, *rest):
                *stays, state = rest
                if save_states:
                    kept[0][row, step, own] = state
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def token(t, state):
                    state = _decay_factors(rate, factors, stays, t) * state
                    state += broadcast_per_row(_load_channel_vector(x, t), shape) * _load_state_vector(b, t, shape)
                    staged.at[t][...] = jnp.sum(state * _load_state_vector(c, t, shape), axis=1).astype(staged.dtype)
                    return state

                state = lax.fori_loop(0, CHUNK, token, state)
                plgpu.commit_smem()
                copy_smem_to_gmem((staged, out.at[row, pl.ds(step * CHUNK, CHUNK), own]))
                return state

            tokens = [x.at[row, :, own], rate.at[row, :, own]]
            along = [z.at[row] for z in (b, c, *stays)]
            final[row, own] = _chunk_pipeline(chunk, tokens, along, _load_matrix(start.at[row, own]), count)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, plgpu.SMEM((CHUNK, BLOCK_CHANNELS), x.dtype))

    kept = (jax.ShapeDtypeStruct((rows, count, channels, depth), jnp.float32),) if save_states else ()
    return launch_kernel(
        forward,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(inputs.state.shape, jnp.float32), kept),
        grid={"row": rows, "block": channels // BLOCK_CHANNELS},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
    )(*inputs, () if state_mask is None else (state_mask,))


def _backward(interpret, inputs, state_mask, states, grad, state_grad):
    """The gradients of x and rate, of a per row, of b and c per block of channels, and of the first state."""
    x, _, a, *_ = inputs
    (rows, length, channels), depth = x.shape, a.shape[1]
    count, shape, blocks = length // CHUNK, (BLOCK_CHANNELS, depth), channels // BLOCK_CHANNELS

    def backward(x, rate, a, b, c, end, grad, stays, states, dx, drate, da, db, dc, first):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        own = pl.ds(block * BLOCK_CHANNELS, BLOCK_CHANNELS)

        def scoped(past, narrow, wide, mixes):
            factors = _load_matrix(a.at[own])

            def chunk(step, x, rate, grad, b, c, *rest):
                *stays, carried = rest

                def again(t, state):
                    past.at[t][...] = state
                    state = _decay_factors(rate, factors, stays, t) * state
                    return state + broadcast_per_row(_load_channel_vector(x, t), shape) * _load_state_vector(
                        b, t, shape
                    )

                lax.fori_loop(0, CHUNK, again, _load_matrix(states.at[row, step, own]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def token(i, carried):
                    slope, factor_slope = carried
                    t = CHUNK - 1 - i
                    kept, wrote = (
                        _decay_factors(rate, factors, stays, t),
                        broadcast_per_row(_load_channel_vector(x, t), shape),
                    )
                    read, write = (
                        broadcast_per_row(_load_channel_vector(grad, t), shape),
                        _load_state_vector(b, t, shape),
                    )
                    decayed = kept * plgpu.load(past.at[t], layout=WGMMA)
                    slope += read * _load_state_vector(c, t, shape)
                    mixes.at[0, t][...] = jnp.sum(slope * wrote, axis=0)
                    mixes.at[1, t][...] = jnp.sum(read * (decayed + wrote * write), axis=0)
                    narrow.at[t][...] = jnp.sum(slope * write, axis=1).astype(narrow.dtype)
                    exponent = slope * decayed
                    wide.at[t][...] = jnp.sum(exponent * factors, axis=1)
                    return slope * kept, factor_slope + exponent * broadcast_per_row(
                        _load_channel_vector(rate, t), shape
                    )

                carried = lax.fori_loop(0, CHUNK, token, carried)
                plgpu.commit_smem()
                time = pl.ds(step * CHUNK, CHUNK)
                copies = [(narrow, dx.at[row, time, own]), (wide, drate.at[row, time, own])]
                copy_smem_to_gmem(*copies, *((mixes.at[i], x.at[row, block, time]) for i, x in enumerate((db, dc))))
                return carried

            tokens = [z.at[row, :, own] for z in (x, rate, grad)]
            along = [z.at[row] for z in (b, c, *stays)]
            carried = _load_matrix(end.at[row, own]), zero_accumulator(*shape)
            first[row, own], da[row, own] = _chunk_pipeline(chunk, tokens, along, carried, count, reverse=True)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((CHUNK, *shape), jnp.float32),
            plgpu.SMEM((CHUNK, BLOCK_CHANNELS), x.dtype),
            plgpu.SMEM((CHUNK, BLOCK_CHANNELS), jnp.float32),
            plgpu.SMEM((2, CHUNK, depth), jnp.float32),
        )

    mixed = jax.ShapeDtypeStruct((rows, blocks, length, depth), jnp.float32)
    of_states = jax.ShapeDtypeStruct((rows, channels, depth), jnp.float32)
    return launch_kernel(
        backward,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(x.shape, jnp.float32),
            of_states,
            mixed,
            mixed,
            of_states,
        ),
        grid={"row": rows, "block": blocks},
        num_consumer_wgs=1,
        num_producer_wgs=0,
        interpret=interpret,
        column_sums=True,
    )(*inputs[:5], state_grad, grad, () if state_mask is None else (state_mask,), states)
