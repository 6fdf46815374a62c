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

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.linear_attention.gates import LOG2E
from recallax.pallas_kernels.linear_attention.segments import How, cut, join, starts
from recallax.pallas_kernels.mosaic_gpu import (
    COLUMNS,
    MATRIX,
    ROWS,
    along_columns,
    along_rows,
    launch,
    send,
    zeros,
)

CHUNK = 16
"""Tokens between the states that are kept, and that TMA brings in together."""
CHANNELS = 64
"""Of a block."""
STATES = 32
"""Per channel at most: what 16 of them take of shared memory in the backward pass."""
BLOCKS = 528
"""Of threads that an H100 has room for: four on each of 132 multiprocessors."""
LEAST_TOKENS = 512
"""Of a segment."""
WALKS = 2
"""Over a row that is cut into segments, in place of one, so fewer segments than one more would gain nothing."""
AHEAD, AHEAD_BACK = 3, 1
"""Chunks that TMA brings in ahead; backward two blocks share a multiprocessor's memory so."""


class _Inputs(NamedTuple):
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
    docs: Documents | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """The op's form for Hopper; x is float32 or bfloat16, N at most 32."""
    interpret = interpreting("gpu")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"x is {x.dtype}; it must be float32 or bfloat16")
    (_, length, channels), states = x.shape, a.shape[1]
    if states > STATES:
        raise Unsupported(f"N is {states}; it must be at most {STATES}")
    segments = min(BLOCKS // (len(x) * -(-channels // CHANNELS)), length // LEAST_TOKENS)
    segments = segments if segments > WALKS else 1
    extra, stays = -length % (CHUNK * segments), None
    if docs is not None:  # padding keeps its state and does not write; a document's first token drops what was before
        valid = docs.valid[..., None]
        x, rate = (jnp.where(valid, part, jnp.zeros((), part.dtype)) for part in (x, rate))
        stays = jnp.diff(docs.index, axis=1, prepend=0) == 0
        stays = jnp.pad(stays.astype(jnp.float32), ((0, 0), (0, extra)), constant_values=1.0)
        stays = jnp.repeat(stays[..., None], states + -states % 8, axis=2)  # of one token it would be too small to copy
    time, width, depth = (0, extra), (0, -channels % CHANNELS), (0, -states % 8)

    def wide(part, *room):
        return jnp.pad(part.astype(jnp.float32), room)

    inputs = _Inputs(
        jnp.pad(x, ((0, 0), time, width)),
        wide(rate, (0, 0), time, width),
        wide(a * LOG2E, width, depth),
        wide(b, (0, 0), time, depth),
        wide(c, (0, 0), time, depth),
        wide(state, (0, 0), width, depth),
    )
    out, final = _scan(How(1.0, segments, interpret), inputs, stays)
    return out[:, :length, :channels], final[:, :channels, :states]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(how: How, inputs: _Inputs, stays: Float[Array, "B T N"] | None):
    return _in_segments(how, inputs, stays, keep=False)[:2]


def _scan_fwd(how, inputs, stays):
    *results, kept = _in_segments(how, inputs, stays, keep=True)
    return tuple(results), (inputs, stays, kept)


def _scan_bwd(how, residuals, cotangents):
    (inputs, stays, (states,)), (grad, state_grad), n = residuals, cotangents, how.segments
    parts, own, grad = _cut(inputs, n), None if stays is None else cut(stays, n), cut(grad, n)
    walked = functools.partial(_backward, how.interpret, parts, own, states, grad)
    last = _starts(lambda state: walked(state)[-1], inputs, stays, state_grad, n, reverse=True)
    dx, drate, da, db, dc, first = walked(last)
    dx, drate, db, dc = (join(part, n) for part in (dx, drate, jnp.sum(db, axis=1), jnp.sum(dc, axis=1)))
    return _Inputs(dx, drate / LOG2E, jnp.sum(da, axis=0) / LOG2E, db, dc, first[::n]), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _in_segments(how, inputs, stays, *, keep):
    """`_forward` over all segments of a row at once; what is kept stays cut."""
    n, interpret = how.segments, how.interpret
    parts, own = _cut(inputs, n), None if stays is None else cut(stays, n)

    def before(state):
        return _forward(interpret, parts._replace(state=state), own, keep=False)[1]

    first = _starts(before, inputs, stays, inputs.state, n, reverse=False)
    out, final, kept = _forward(interpret, parts._replace(state=first), own, keep=keep)
    return join(out, n), final[n - 1 :: n], kept


def _cut(inputs: _Inputs, segments: int) -> _Inputs:
    """Every segment as a row, but for the states."""
    tokens = {name: cut(getattr(inputs, name), segments) for name in ("x", "rate", "b", "c")}
    return inputs._replace(**tokens)


def _starts(other_side, inputs, stays, state, segments, *, reverse):
    """The state before each segment, or its gradient behind it, by a walk that starts from empty ones."""
    if segments == 1:
        return state
    rates = jnp.sum(cut(inputs.rate, segments), axis=1)[..., None]
    left = jnp.exp2(rates * inputs.a[None])
    if stays is not None:
        left = left * jnp.min(cut(stays, segments), axis=1)[:, None]
    return starts(other_side(jnp.zeros(left.shape, state.dtype)), left, state, reverse=reverse)


def _walk(chunk, tokens, along, first, count, *, reverse=False):
    """The last of carry = chunk(step, *blocks, carry) for all chunks.

    tokens: references [T, 64]; along: references [T, N]. A block is one warpgroup, which copies as well, so that
    several blocks fit on a multiprocessor.
    """

    def order(step):
        return count - 1 - step if reverse else step

    specs = [plgpu.BlockSpec((CHUNK, CHANNELS), lambda step: (order(step), 0)) for _ in tokens]
    specs += [plgpu.BlockSpec((CHUNK, x.shape[1]), lambda step: (order(step), 0)) for x in along]
    return plgpu.emit_pipeline(
        lambda index, *refs: chunk(order(index[0]), *refs),
        grid=(count,),
        in_specs=specs,
        max_concurrent_steps=1 + (AHEAD_BACK if reverse else AHEAD),
        init_carry=first,
    )(*tokens, *along)


def _row(ref, t):
    """What belongs to the channels at a token."""
    return plgpu.load(ref.at[t], layout=ROWS).astype(jnp.float32)


def _column(ref, t, shape):
    """What belongs to the states at a token."""
    return along_columns(plgpu.load(ref.at[t], layout=COLUMNS), shape)


def _kept(rate, a, stays, t):
    """The factors of a token on the states."""
    factor = jnp.exp2(along_rows(_row(rate, t), a.shape) * a)
    return factor * _column(stays[0], t, a.shape) if stays else factor


def _matrix(ref):
    return plgpu.load(ref, layout=MATRIX, optimized=False)


def _forward(interpret, inputs, stays, *, keep):
    """The output, the final state and, if wanted, the states before the chunks."""
    x, _, a, *_ = inputs
    (rows, length, channels), depth = x.shape, a.shape[1]
    count, shape = length // CHUNK, (CHANNELS, depth)

    def forward(x, rate, a, b, c, start, stays, out, final, kept):
        row, own = lax.axis_index("row"), pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)

        def scoped(staged):
            factors = _matrix(a.at[own])

            def chunk(step, x, rate, b, c, *rest):
                *stays, state = rest
                if keep:
                    kept[0][row, step, own] = state
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def token(t, state):
                    state = _kept(rate, factors, stays, t) * state
                    state += along_rows(_row(x, t), shape) * _column(b, t, shape)
                    staged.at[t][...] = jnp.sum(state * _column(c, t, shape), axis=1).astype(staged.dtype)
                    return state

                state = lax.fori_loop(0, CHUNK, token, state)
                plgpu.commit_smem()
                send((staged, out.at[row, pl.ds(step * CHUNK, CHUNK), own]))
                return state

            tokens = [x.at[row, :, own], rate.at[row, :, own]]
            along = [z.at[row] for z in (b, c, *stays)]
            final[row, own] = _walk(chunk, tokens, along, _matrix(start.at[row, own]), count)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, plgpu.SMEM((CHUNK, CHANNELS), x.dtype))

    kept = (jax.ShapeDtypeStruct((rows, count, channels, depth), jnp.float32),) if keep else ()
    return launch(
        forward,
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(inputs.state.shape, jnp.float32), kept),
        grid={"row": rows, "block": channels // CHANNELS},
        workers=1,
        copiers=0,
        interpret=interpret,
    )(*inputs, () if stays is None else (stays,))


def _backward(interpret, inputs, stays, states, grad, state_grad):
    """The gradients of x and rate, of a per row, of b and c per block of channels, and of the first state."""
    x, _, a, *_ = inputs
    (rows, length, channels), depth = x.shape, a.shape[1]
    count, shape, blocks = length // CHUNK, (CHANNELS, depth), channels // CHANNELS

    def backward(x, rate, a, b, c, end, grad, stays, states, dx, drate, da, db, dc, first):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        own = pl.ds(block * CHANNELS, CHANNELS)

        def scoped(past, narrow, wide, mixes):
            factors = _matrix(a.at[own])

            def chunk(step, x, rate, grad, b, c, *rest):
                *stays, carried = rest

                def again(t, state):
                    past.at[t][...] = state
                    state = _kept(rate, factors, stays, t) * state
                    return state + along_rows(_row(x, t), shape) * _column(b, t, shape)

                lax.fori_loop(0, CHUNK, again, _matrix(states.at[row, step, own]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def token(i, carried):
                    slope, factor_slope = carried
                    t = CHUNK - 1 - i
                    kept, wrote = _kept(rate, factors, stays, t), along_rows(_row(x, t), shape)
                    read, write = along_rows(_row(grad, t), shape), _column(b, t, shape)
                    decayed = kept * plgpu.load(past.at[t], layout=MATRIX)
                    slope += read * _column(c, t, shape)
                    mixes.at[0, t][...] = jnp.sum(slope * wrote, axis=0)
                    mixes.at[1, t][...] = jnp.sum(read * (decayed + wrote * write), axis=0)
                    narrow.at[t][...] = jnp.sum(slope * write, axis=1).astype(narrow.dtype)
                    exponent = slope * decayed
                    wide.at[t][...] = jnp.sum(exponent * factors, axis=1)
                    return slope * kept, factor_slope + exponent * along_rows(_row(rate, t), shape)

                carried = lax.fori_loop(0, CHUNK, token, carried)
                plgpu.commit_smem()
                time = pl.ds(step * CHUNK, CHUNK)
                copies = [(narrow, dx.at[row, time, own]), (wide, drate.at[row, time, own])]
                send(*copies, *((mixes.at[i], x.at[row, block, time]) for i, x in enumerate((db, dc))))
                return carried

            tokens = [z.at[row, :, own] for z in (x, rate, grad)]
            along = [z.at[row] for z in (b, c, *stays)]
            carried = _matrix(end.at[row, own]), zeros(*shape)
            first[row, own], da[row, own] = _walk(chunk, tokens, along, carried, count, reverse=True)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            scoped,
            plgpu.SMEM((CHUNK, *shape), jnp.float32),
            plgpu.SMEM((CHUNK, CHANNELS), x.dtype),
            plgpu.SMEM((CHUNK, CHANNELS), jnp.float32),
            plgpu.SMEM((2, CHUNK, depth), jnp.float32),
        )

    mixed = jax.ShapeDtypeStruct((rows, blocks, length, depth), jnp.float32)
    of_states = jax.ShapeDtypeStruct((rows, channels, depth), jnp.float32)
    return launch(
        backward,
        out=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(x.shape, jnp.float32),
            of_states,
            mixed,
            mixed,
            of_states,
        ),
        grid={"row": rows, "block": blocks},
        workers=1,
        copiers=0,
        interpret=interpret,
        column_sums=True,
    )(*inputs[:5], state_grad, grad, () if stays is None else (stays,), states)
