"""The gated delta rule on Hopper: what chunks do for themselves in parallel, and a walk that carries the state on chip.

    U = T (w V - b 2^L K S),   T = (I + A)^{-1}

The inverses T of all chunks come first (`mosaic_gpu_solve.py`), then the walk over time (`walks.py`). For the gradients
that walk also keeps U and the state before each chunk; a walk backward in time gives their gradients, and then every
chunk's part is its own (`mosaic_gpu_gradients.py`). Documents and padding are in the gates. Operands of products are
bfloat16, T and what it multiplies two of them, sums and the state float32. Decays and strengths per channel are in
`mosaic_gpu_channels.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.delta_rule import mosaic_gpu_channels as channels
from recallax.pallas_kernels.delta_rule.mosaic_gpu_gradients import chunk_gradients
from recallax.pallas_kernels.delta_rule.segments import backward_starts, forward_starts, joined, number_of_segments
from recallax.pallas_kernels.delta_rule.walks import Kept, Walk, ascend, descend
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.linear_attention.gates import chunk_decay_slope, gates_of, log2_decay, log2_decays
from recallax.pallas_kernels.linear_attention.segments import How, cut, cut_last, join
from recallax.pallas_kernels.mosaic_gpu import CHUNK, launch
from recallax.pallas_kernels.mosaic_gpu_solve import inverses

WIDTHS = (64, 128)
"""Of keys and of values: what a warpgroup's registers and the tensor cores' tiles are made for."""


class _Inputs(NamedTuple):
    """T is a multiple of the chunk, and the decay is a log2."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    erase: Float[Array, "B T H"]
    write: Float[Array, "B T H"]
    decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    erase: Float[Array, "B T H W"],
    write: Float[Array, "B T H 1"],
    log_decay: Float[Array, "B T H W2"] | None,
    state: Float[Array, "B H K V"],
    docs: Documents | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for Hopper: bfloat16, K and V of 64 or 128, any strengths and decays."""
    interpret = interpreting("gpu")
    for name, size in (("K", q.shape[3]), ("V", v.shape[3])):
        if size not in WIDTHS:
            raise Unsupported(f"{name} is {size}; it must be one of {WIDTHS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    length = q.shape[1]
    segments = number_of_segments(v.shape[0] * v.shape[2], -(-length // CHUNK))
    extra = -length % (CHUNK * segments)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    erase, write = erase.astype(jnp.float32), write.astype(jnp.float32)
    valid = True if docs is None else docs.valid[..., None, None]
    if docs is not None:  # padding neither erases nor writes
        erase, write = (jnp.where(valid, x, 0.0) for x in (erase, write))
        docs = Documents(jnp.pad(docs.index, ((0, 0), (0, extra)), mode="edge"), padded(docs.valid))
    if max(erase.shape[3], 0 if log_decay is None else log_decay.shape[3]) > 1:
        shape = (*v.shape[:3], q.shape[3])
        decay = jnp.zeros(shape, jnp.float32) if log_decay is None else jnp.broadcast_to(log2_decays(log_decay), shape)
        decay = jnp.where(valid, decay, 0.0)  # nor does padding decay
        e = (jnp.repeat(k, v.shape[2] // k.shape[2], axis=2).astype(jnp.float32) * erase).astype(k.dtype)
        q, k, e, v, write, decay = (padded(x) for x in (q, k, e, v, write[..., 0], decay))
        inputs = channels.Inputs(q, k, e, v, write, decay, state)
        out, final = channels.attend(How(scale, segments, interpret), inputs, docs)
        return out[:, :length], final
    decay = None if log_decay is None else padded(log2_decay(log_decay))
    inputs = _Inputs(padded(q), padded(k), padded(v), padded(erase[..., 0]), padded(write[..., 0]), decay, state)
    out, final = _attend(How(scale, segments, interpret), inputs, docs)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, inputs: _Inputs, docs: Documents | None):
    gates, erase = _gates(inputs, docs)
    inverse = inverses(inputs.k, gates, erase, interpret=how.interpret)
    return _forward(how, inputs, gates, inverse, keep=False)[:2]


def _attend_fwd(how, inputs, docs):
    gates, erase = _gates(inputs, docs)
    inverse = inverses(inputs.k, gates, erase, interpret=how.interpret)
    out, final, kept, through = _forward(how, inputs, gates, inverse, keep=True)
    return (out, final), (inputs, docs, inverse, kept, through)


def _attend_bwd(how, residuals, cotangents):
    (inputs, docs, inverse, (new, states), through), (grad, state_grad) = residuals, cotangents
    q, k, v, _, write, decay, _ = inputs
    gates, erase = _gates(inputs, docs)
    slope, slopes, first = _backward(how, inputs, gates, inverse, through, grad, state_grad)
    parts = chunk_gradients(
        q, k, (grad, new, slope), (states, slopes), gates, erase, how.scale, interpret=how.interpret
    )
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in parts[:2])
    wanted = slope.astype(jnp.float32)
    dv, dwrite = (wanted * write[..., None]).astype(v.dtype), jnp.sum(wanted * v.astype(jnp.float32), axis=3)
    decay_slope = None
    if decay is not None:
        ends = jnp.sum(parts.ends.reshape(*parts.ends.shape[:3], -1, CHUNK), axis=(2, 4))
        decay_slope = chunk_decay_slope(jnp.sum(parts.through, axis=2), ends, docs)
    return _Inputs(dq, dk, dv, jnp.moveaxis(jnp.sum(parts.erase, axis=2), 1, 2), dwrite, decay_slope, first), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _gates(inputs: _Inputs, docs: Documents | None):
    """The gates, and the strength of erasing with time last."""
    return gates_of(inputs.decay, docs, inputs.v.shape[2], CHUNK), jnp.moveaxis(inputs.erase, 2, 1)


def _forward(how, inputs, gates, inverse, *, keep):
    """The output, the final state, if wanted U and the states before the chunks, and what segments do to a state."""
    n, (q, k, v, erase, write, _, state) = how.segments, inputs
    q, k, v, inverse = cut(q, n), cut(k, n), cut(v, n), cut_last(inverse, n)
    *vectors, write = (cut_last(x, n) for x in (*(gates or ()), *(jnp.moveaxis(x, 2, 1) for x in (erase, write))))

    def ascended(v, write, state, keep):
        return _ascended(how, (q, k, v, inverse), (*vectors, write), state, keep)

    keys = jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
    first, through = forward_starts(lambda v, write, start: ascended(v, write, start, False)[1], v, write, keys, state)
    out, final, kept = ascended(v, write, first, keep)
    return join(out, n), final[n - 1 :: n], joined(kept, n), through


def _ascended(how, tokens, vectors, state, keep):
    """`ascend` for all heads and rows."""
    q, _, v, _ = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = Walk(t, width, values, how.scale, how.interpret)

    def forward(q, k, v, inverse, vectors, start, out, final, kept):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = [q.at[row, :, group], k.at[row, :, group], v.at[row, :, head], inverse.at[row, head]]
        vectors = [x.at[row, head] for x in vectors]
        left = Kept(kept[0].at[row, :, head], kept[1].at[row, head]) if keep else None
        ascend(sizes, tokens, vectors, start.at[row, head], out.at[row, :, head], final.at[row, head], left)

    chosen = jax.ShapeDtypeStruct(v.shape, v.dtype), _states(b, h, t, width, values)
    return launch(
        forward,
        out=(chosen[0], jax.ShapeDtypeStruct(state.shape, jnp.float32), chosen if keep else ()),
        grid={"row": b, "head": h},
        workers=sizes.workers,
        interpret=how.interpret,
    )(*tokens, vectors, state)


def _backward(how, inputs, gates, inverse, through, grad, state_grad):
    """The gradients of w V, of the states behind the chunks, and of the first state."""
    n, (q, k) = how.segments, inputs[:2]
    tokens = cut(q, n), cut(k, n), cut(grad, n), cut_last(inverse, n)
    vectors = tuple(cut_last(x, n) for x in (*(gates or ()), jnp.moveaxis(inputs.erase, 2, 1)))
    walked = functools.partial(_descended, how, tokens, vectors)
    last = backward_starts(lambda state: walked(state)[2], through, state_grad)
    slope, slopes, first = walked(last)
    return *joined((slope, slopes), n), first[::n]


def _descended(how, tokens, vectors, state):
    """`descend` for all heads and rows."""
    q, _, grad, _ = tokens
    (b, t, groups, width), (h, values) = q.shape, grad.shape[2:]
    sizes = Walk(t, width, values, how.scale, how.interpret)

    def backward(q, k, grad, inverse, vectors, end, slope, slopes, first):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = [q.at[row, :, group], k.at[row, :, group], grad.at[row, :, head], inverse.at[row, head]]
        vectors = [x.at[row, head] for x in vectors]
        kept = Kept(slope.at[row, :, head], slopes.at[row, head])
        descend(sizes, tokens, vectors, end.at[row, head], first.at[row, head], kept)

    return launch(
        backward,
        out=(
            jax.ShapeDtypeStruct(grad.shape, grad.dtype),
            _states(b, h, t, width, values),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        workers=sizes.workers,
        interpret=how.interpret,
    )(*tokens, vectors, state)


def _states(b, h, t, width, values):
    return jax.ShapeDtypeStruct((b, h, t // CHUNK, width, values), jnp.bfloat16)
