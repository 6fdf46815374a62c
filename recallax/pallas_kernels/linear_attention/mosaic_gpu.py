"""Linear attention on Hopper: one pass over time per head, with the state on chip.

A block of threads owns one value head of one row. It walks over chunks of 64 tokens that TMA brings in ahead of it and
carries the float32 state in registers; nothing but inputs and outputs touches the device's memory. With L the
cumulative log2-decay of a chunk, in the notation of `xla.py`,

    o_i = 2^L_i S^T q_i + sum_{j<=i} 2^(L_i - L_j) (q_i.k_j) v_j        S <- 2^L_C S + sum_j k_j (2^(L_C - L_j) v_j)^T

Documents and padding are in the gates (`gates.py`); without decays and documents there are none. Operands of products
are bfloat16, sums and the state float32. Decays per channel are in `mosaic_gpu_channels.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.linear_attention import mosaic_gpu_channels as channels
from recallax.pallas_kernels.linear_attention.gates import decay_slope, gates_of, log2_decay, log2_decays
from recallax.pallas_kernels.linear_attention.segments import (
    How,
    cut,
    cut_gates,
    first_states,
    join,
    join_last,
    number_of_segments,
)
from recallax.pallas_kernels.linear_attention.walks import Walk, ascend, descend
from recallax.pallas_kernels.mosaic_gpu import CHUNK, launch

WIDTHS = (64, 128)
"""Of keys and of values: what a warpgroup's registers and the tensor cores' tiles are made for."""


class _Inputs(NamedTuple):
    """T is a multiple of the chunk, and the decay is a log2."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H K V"] | None,
    docs: Documents | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for Hopper: bfloat16, K and V of 64 or 128."""
    interpret = interpreting("gpu")
    width, values, length = q.shape[3], v.shape[3], q.shape[1]
    for name, size in (("K", width), ("V", values)):
        if size not in WIDTHS:
            raise Unsupported(f"{name} is {size}; it must be one of {WIDTHS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], width, values), jnp.float32)

    per_channel = log_decay is not None and log_decay.shape[3] > 1
    segments = number_of_segments(v.shape[0] * v.shape[2], -(-length // CHUNK))
    extra = -length % (CHUNK * segments)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    if docs is not None:
        docs = Documents(jnp.pad(docs.index, ((0, 0), (0, extra)), mode="edge"), padded(docs.valid))
    if log_decay is not None and per_channel:
        decay = padded(log2_decays(log_decay))
        decay = decay if docs is None else jnp.where(docs.valid[..., None, None], decay, 0.0)
        inputs = channels.Inputs(padded(q), padded(k), padded(v), decay, state)
        out, final = channels.attend(How(scale, segments, interpret), inputs, docs)
        return out[:, :length], final
    decay = None if log_decay is None else padded(log2_decay(log_decay))
    inputs = _Inputs(padded(q), padded(k), padded(v), decay, state)
    out, final = _attend(How(scale, segments, interpret), inputs, docs)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, inputs: _Inputs, docs: Documents | None):
    return _attend_fwd(how, inputs, docs)[0]


def _attend_fwd(how, inputs, docs):
    n, (_, k, v, decay, state) = how.segments, inputs
    gates = gates_of(decay, docs, v.shape[2], CHUNK)
    starts = first_states(k, v, gates, state, n, reverse=False, interpret=how.interpret)
    out, finals = _forward(_in_segments(inputs, n), cut_gates(gates, n), starts, how)
    return (join(out, n), finals[n - 1 :: n]), (inputs, docs)


def _attend_bwd(how, kept, cotangents):
    """Two walks, as for the forward pass.

    A pair of tokens is in the sums for the decay's gradient twice, as q.dq and as k.dk, and in that gradient only
    where the two do not cancel. So both walks must see one rounding: decays are rounded into the keys of the first and
    into the queries of the second, the sums are of those, pairs within a chunk are float32 in both, and in the
    products for the sums the states have their lower digits too.
    """
    (inputs, docs), n = kept, how.segments
    q, k, v, decay, state = inputs
    grad, state_grad = cotangents
    gates, gated = gates_of(decay, docs, v.shape[2], CHUNK), decay is not None
    state, end = jnp.swapaxes(state, 2, 3), jnp.swapaxes(state_grad, 2, 3)
    starts = first_states(v, k, gates, state, n, reverse=False, interpret=how.interpret)
    ends = first_states(grad, q, gates, end, n, scale=how.scale, reverse=True, interpret=how.interpret)
    gates, parts, grad = cut_gates(gates, n), _in_segments(inputs, n), cut(grad, n)
    dq, ascended = _query_gradient(parts, gates, grad, starts, how, gated=gated)
    dk, dv, dstates, descended = _key_gradients(parts, gates, grad, jnp.swapaxes(ends, 2, 3), how, gated=gated)
    dq, dk, dv = join(dq, n), join(dk, n), join(dv, n)
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    slope = None
    if gated:
        finals, queries = ascended
        at_end = jnp.sum(finals[n - 1 :: n] * end, axis=(2, 3))
        through = jnp.sum(queries, axis=2) - jnp.sum(descended[0], axis=2)
        slope = decay_slope(join_last(through, n), at_end, docs)
    return _Inputs(dq, dk, dv, slope, dstates[::n]), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _in_segments(inputs: _Inputs, segments: int) -> tuple[Array, Array, Array]:
    return cut(inputs.q, segments), cut(inputs.k, segments), cut(inputs.v, segments)


def _forward(tokens, gates, state, how):
    q, k, v = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = Walk(t, width, values, how.scale, how.interpret, min(width, values) // 64)

    def forward(q, k, v, gates, start, out, final):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = q.at[row, :, group], k.at[row, :, group], v.at[row, :, head]
        gates = [gate.at[row, head] for gate in gates]
        ascend(sizes, tokens, gates, start.at[row, head], out.at[row, :, head], final=final.at[row, head])

    return launch(
        forward,
        out=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        grid={"row": b, "head": h},
        workers=sizes.workers,
        interpret=how.interpret,
    )(q, k, v, gates or (), state)


def _query_gradient(tokens, gates, grad, state, how, *, gated):
    """The gradient of q per value head. If `gated` also the final state transposed and sums for the decay's gradient.

    That is linear attention itself, of the queries `grad`, the keys v, the values k and the transposed state.
    """
    q, k, v = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = Walk(t, values, width, how.scale, how.interpret, min(width, values) // 64)

    def query_gradient(q, k, v, gates, start, grad, dq, kept):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = [grad.at[row, :, head], v.at[row, :, head], k.at[row, :, group]]
        tokens += [q.at[row, :, group]] if gated else []
        final, sums = (x.at[row, head] for x in kept) if gated else (None, None)
        gates = [gate.at[row, head] for gate in gates]
        ascend(sizes, tokens, gates, start.at[row, head], dq.at[row, :, head], final=final, sums=sums)

    kept = (
        jax.ShapeDtypeStruct((b, h, values, width), jnp.float32),
        jax.ShapeDtypeStruct((b, h, sizes.workers, t), jnp.float32),
    )
    return launch(
        query_gradient,
        out=(jax.ShapeDtypeStruct((b, t, h, width), q.dtype), kept if gated else ()),
        grid={"row": b, "head": h},
        workers=sizes.workers,
        interpret=how.interpret,
    )(q, k, v, gates or (), state, grad)


def _key_gradients(tokens, gates, grad, state_grad, how, *, gated):
    """The gradients of k per value head, of v and of the state; if `gated` also sums for the decay's gradient."""
    q, k, v = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = Walk(t, width, values, how.scale, how.interpret, max(width, values) // 64)

    def key_gradients(q, k, v, gates, grad, end, dk, dv, start, sums):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = q.at[row, :, group], k.at[row, :, group], v.at[row, :, head], grad.at[row, :, head]
        dk, dv, start, end = dk.at[row, :, head], dv.at[row, :, head], start.at[row, head], end.at[row, head]
        sums = sums[0].at[row, head] if gated else None
        descend(sizes, tokens, [gate.at[row, head] for gate in gates], end, dk, dv, start, sums)

    sums = jax.ShapeDtypeStruct((b, h, sizes.workers, t), jnp.float32)
    return launch(
        key_gradients,
        out=(
            jax.ShapeDtypeStruct((b, t, h, width), k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
            (sums,) if gated else (),
        ),
        grid={"row": b, "head": h},
        workers=sizes.workers,
        interpret=how.interpret,
    )(q, k, v, gates or (), grad, state_grad)
