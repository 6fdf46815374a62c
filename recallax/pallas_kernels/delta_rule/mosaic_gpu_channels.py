"""The delta rule with decays, or strengths of erasing, per channel on Hopper (KDA).

    U = T (w V - E~ S)        O = Q~ S + P U        S <- Diag(2^L_C) S + K~^T U

with E = b K. As for linear attention, all chunks' Q~, E~, K~, scores P and inverses T come first
(`pallas_kernels/mosaic_gpu_channels.py`). What erases reads the keys before its own as a query reads those up to its
own, so its gradients are those of linear attention for the output gradient -dW (`walks.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.delta_rule.segments import backward_starts, forward_starts, joined
from recallax.pallas_kernels.delta_rule.walks import OWN, Kept, Walk, ascend_decayed, descend_decayed
from recallax.pallas_kernels.linear_attention.gates import Gates, gates_of
from recallax.pallas_kernels.linear_attention.segments import How, cut, cut_last, join
from recallax.pallas_kernels.mosaic_gpu import CHUNK, launch
from recallax.pallas_kernels.mosaic_gpu_channel_gradients import channel_gradients
from recallax.pallas_kernels.mosaic_gpu_channels import decayed, erasing


class Inputs(NamedTuple):
    """T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    e: Float[Array, "B T H K"]
    """What erases."""
    v: Float[Array, "B T H V"]
    write: Float[Array, "B T H"]
    decay: Float[Array, "B T H K"]
    """A log2, at least -150."""
    state: Float[Array, "B H K V"]


class _Parts(NamedTuple):
    """What chunks do for themselves, as the walks take it."""

    q: Float[Array, "B T H K"]
    e: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    scores: Float[Array, "B H T C"]
    inverse: Float[Array, "B H T D"]
    stays: Float[Array, "B H N K"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(how: How, inputs: Inputs, docs: Documents | None) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The output and the final state."""
    return _forward(how, inputs, _prepared(how.scale, how.interpret, inputs, docs), keep=False)[:2]


def _attend_fwd(how, inputs, docs):
    parts = _prepared(how.scale, how.interpret, inputs, docs)
    out, final, kept, through = _forward(how, inputs, parts, keep=True)
    return (out, final), (inputs, docs, parts, kept, through)


def _attend_bwd(how, residuals, cotangents):
    (inputs, docs, parts, (new, states), through), (grad, state_grad) = residuals, cotangents
    q, k, e, v, write, decay, _ = inputs
    gates = _document_gates(docs)
    slope, slopes, first = _backward(how, parts, through, grad, state_grad)
    shared = functools.partial(channel_gradients, interpret=how.interpret)
    dq, dk, ddecay = shared(q, k, decay, (grad, new), (states, slopes), parts.stays, gates, how.scale)
    de, dk_erased, ddecay_erased = shared(e, k, decay, (slope, new), (states,), parts.stays, gates, -1.0)
    dk = dk.astype(jnp.float32) + dk_erased.astype(jnp.float32)
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    wanted = slope.astype(jnp.float32)
    dv, dwrite = (wanted * write[..., None]).astype(v.dtype), jnp.sum(wanted * v.astype(jnp.float32), axis=3)
    return Inputs(dq, dk, de, dv, dwrite, ddecay + ddecay_erased, first), None


attend.defvjp(_attend_fwd, _attend_bwd)


def _document_gates(docs: Documents | None) -> Gates | None:
    return gates_of(None, docs, 1, CHUNK)


def _prepared(scale: float, interpret: bool, inputs: Inputs, docs: Documents | None) -> _Parts:
    q, k, e, _, _, decay, _ = inputs
    gates = _document_gates(docs)
    reading = decayed(q, k, decay, gates, scale, interpret=interpret)
    erased = erasing(e, k, decay, gates, interpret=interpret)
    stays = jnp.sum(decay.reshape(decay.shape[0], -1, CHUNK, *decay.shape[2:]), axis=2)
    if gates is not None:
        stays += gates.query[:, 0, CHUNK - 1 :: CHUNK, None, None]
    stays = jnp.moveaxis(jnp.exp2(stays), 2, 1)
    return _Parts(reading.q, erased.e, reading.k, reading.scores, erased.inverse, stays)


def _cut(parts: _Parts, segments: int) -> _Parts:
    q, e, k = (cut(x, segments) for x in parts[:3])
    return _Parts(q, e, k, *(cut_last(x, segments) for x in parts[3:]))


def _forward(how, inputs, parts, *, keep):
    """The output, the final state, if wanted U and the states before the chunks, and what segments do to a state."""
    n, interpret = how.segments, how.interpret
    parts, v, write = _cut(parts, n), cut(inputs.v, n), cut_last(jnp.moveaxis(inputs.write, 2, 1), n)

    def final_of(v, write, state):
        return _ascended(interpret, parts, v, write, state, keep=False)[1]

    first, through = forward_starts(final_of, v, write, parts.k, inputs.state)
    out, final, kept = _ascended(interpret, parts, v, write, first, keep=keep)
    return join(out, n), final[n - 1 :: n], joined(kept, n), through


def _ascended(interpret, parts, v, write, state, *, keep):
    """`ascend_decayed` for all heads and rows."""
    (b, t, h, values), width = v.shape, state.shape[2]
    sizes = Walk(t, width, OWN, 1.0, interpret)

    def forward(q, e, k, scores, inverse, stays, v, write, start, out, final, kept):
        row, head, columns = _place()
        tokens = [x.at[row, :, head] for x in (q, e, k)] + [v.at[row, :, head, columns]]
        tokens += [x.at[row, head] for x in (scores, inverse)]
        vectors = [x.at[row, head] for x in (stays, write)]
        left = Kept(kept[0].at[row, :, head, columns], kept[1].at[row, head, :, :, columns]) if keep else None
        start, final = (x.at[row, head, :, columns] for x in (start, final))
        ascend_decayed(sizes, tokens, vectors, start, out.at[row, :, head, columns], final, left)

    chosen = jax.ShapeDtypeStruct(v.shape, v.dtype), _states(b, h, t, width, values)
    return launch(
        forward,
        out=(chosen[0], jax.ShapeDtypeStruct(state.shape, jnp.float32), chosen if keep else ()),
        grid={"row": b, "head": h, "part": values // OWN},
        workers=1,
        interpret=interpret,
    )(*parts[:-1], parts.stays.reshape(b, h, -1), v, write, state)


def _backward(how, parts, through, grad, state_grad):
    """The gradients of w V, of the states behind the chunks, and of the first state."""
    n = how.segments
    walked = functools.partial(_descended, how.interpret, _cut(parts, n), cut(grad, n))
    slope, slopes, first = walked(backward_starts(lambda state: walked(state)[2], through, state_grad))
    return *joined((slope, slopes), n), first[::n]


def _descended(interpret, parts, grad, state_grad):
    """`descend_decayed` for all heads and rows."""
    (b, t, h, values), width = grad.shape, state_grad.shape[2]
    sizes = Walk(t, width, OWN, 1.0, interpret)

    def backward(q, e, k, scores, inverse, stays, grad, end, slope, slopes, first):
        row, head, columns = _place()
        tokens = [x.at[row, :, head] for x in (q, e, k)] + [grad.at[row, :, head, columns]]
        tokens += [x.at[row, head] for x in (scores, inverse)]
        kept = Kept(slope.at[row, :, head, columns], slopes.at[row, head, :, :, columns])
        end, first = (x.at[row, head, :, columns] for x in (end, first))
        descend_decayed(sizes, tokens, [stays.at[row, head]], end, first, kept)

    return launch(
        backward,
        out=(
            jax.ShapeDtypeStruct(grad.shape, grad.dtype),
            _states(b, h, t, width, values),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
        ),
        grid={"row": b, "head": h, "part": values // OWN},
        workers=1,
        interpret=interpret,
    )(*parts[:-1], parts.stays.reshape(b, h, -1), grad, state_grad)


def _place():
    """Row, head and columns of the values of a block."""
    return lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * OWN, OWN)


def _states(b, h, t, width, values):
    return jax.ShapeDtypeStruct((b, h, t // CHUNK, width, values), jnp.bfloat16)
