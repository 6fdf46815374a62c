"""Linear attention with a decay per channel on Hopper (GLA, HGRN2).

    O = Q~ S + P V        S <- Diag(2^L_C) S + K~^T V

All chunks' Q~ (decayed since the chunk's start), K~ (decayed until its end) and scores P come first
(`pallas_kernels/mosaic_gpu_channels.py`), which leaves the walk over time with three products per chunk. Backward the
same walk gives the gradients of V and of the states, with Q~ and K~ exchanged; then each chunk's gradients are its own
(`pallas_kernels/mosaic_gpu_channel_gradients.py`).
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
from recallax.pallas_kernels.linear_attention.gates import Gates, gates_of
from recallax.pallas_kernels.linear_attention.segments import How, added, cut, cut_last, join, join_last, starts
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    MATRIX,
    ROWS,
    accumulate,
    along_rows,
    launch,
    matrix,
    pipelined,
    send,
    unknown_zero,
    zeros,
)
from recallax.pallas_kernels.mosaic_gpu_channel_gradients import channel_gradients
from recallax.pallas_kernels.mosaic_gpu_channels import decayed

OWN = 64
"""Columns of the values and of the state that a warpgroup has."""


class Inputs(NamedTuple):
    """T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    decay: Float[Array, "B T H K"]
    """A log2, at least -150."""
    state: Float[Array, "B H K V"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(how: How, inputs: Inputs, docs: Documents | None) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The output and the final state."""
    parts = _prepared(how, inputs, docs)
    out, final, _ = _walk_segments(parts, inputs.v, inputs.state, how, keep=False)
    return out, final


def _attend_fwd(how, inputs, docs):
    parts = _prepared(how, inputs, docs)
    out, final, (states,) = _walk_segments(parts, inputs.v, inputs.state, how, keep=True)
    return (out, final), (inputs, docs, parts, states)


def _attend_bwd(how, residuals, cotangents):
    (inputs, docs, parts, states), (grad, state_grad) = residuals, cotangents
    q, k, v, decay, _ = inputs
    dv, first, (slopes,) = _walk_segments(parts, grad, state_grad, how, keep=True, reverse=True)
    dq, dk, slope = channel_gradients(
        q, k, decay, (grad, v), (states, slopes), parts.stays, _document_gates(docs), how.scale, interpret=how.interpret
    )
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    return Inputs(dq, dk, dv, slope, first), None


attend.defvjp(_attend_fwd, _attend_bwd)


class _Parts(NamedTuple):
    """What chunks do for themselves."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    scores: Float[Array, "B H T C"]
    stays: Float[Array, "B H N K"]
    """What is left of a state behind each chunk."""


def _prepared(how: How, inputs: Inputs, docs: Documents | None) -> _Parts:
    q, k, _, decay, _ = inputs
    gates = _document_gates(docs)
    stays = jnp.sum(decay.reshape(decay.shape[0], -1, CHUNK, *decay.shape[2:]), axis=2)
    if gates is not None:
        stays += gates.query[:, 0, CHUNK - 1 :: CHUNK, None, None]
    parts = decayed(q, k, decay, gates, how.scale, interpret=how.interpret)
    return _Parts(parts.q, parts.k, parts.scores, jnp.moveaxis(jnp.exp2(stays), 2, 1))


def _walk_segments(parts, v, state, how, *, keep, reverse=False):
    """`_walk` over all segments of a row at once, each from the state that it starts from; in reverse queries write
    and keys read."""
    n = how.segments
    read, written = (parts.k, parts.q) if reverse else (parts.q, parts.k)
    first = segment_starts(written, v, parts.stays, state, n, reverse=reverse, interpret=how.interpret)
    read, written, v = (cut(x, n) for x in (read, written, v))
    scores, stays = (cut_last(x, n) for x in (parts.scores, parts.stays))
    out, final, kept = _walk(read, written, v, scores, stays, first, how.interpret, keep=keep, reverse=reverse)
    return join(out, n), final[0 if reverse else n - 1 :: n], tuple(join_last(x, n) for x in kept)


def segment_starts(
    written: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    stays: Float[Array, "B H N K"],
    state: Float[Array, "B H K V"],
    segments: int,
    *,
    reverse: bool,
    interpret: bool,
) -> Float[Array, "M H K V"]:
    """The state that each of the M = B * segments walks starts from."""
    if segments == 1:
        return state
    here = cut_last(stays, segments)
    # What is left of a chunk's part at the other end of its segment: the product over those that come after it.
    others = jnp.roll(here, 1 if reverse else -1, axis=2).at[:, :, 0 if reverse else -1].set(1.0)
    left = join_last(lax.cumprod(others, axis=2, reverse=not reverse), segments)
    left = jnp.repeat(jnp.moveaxis(left, 1, 2), CHUNK, axis=1)
    written = (written.astype(jnp.float32) * left).astype(written.dtype)
    parts = added(written, v, None, state.shape[1], segments, reverse=reverse, interpret=interpret)
    return starts(parts, jnp.prod(here, axis=2)[..., None], state, reverse=reverse)


def _document_gates(docs: Documents | None) -> Gates | None:
    return gates_of(None, docs, 1, CHUNK)


def _walk(read, written, v, scores, stays, state, interpret, *, keep, reverse=False):
    """read S + scores v for each chunk, and S <- stays * S + written^T v behind it; if `keep` also S before each chunk.

    In reverse the scores are transposed.
    """
    (b, t, h, width), values = read.shape, v.shape[3]
    workers, count = values // OWN, t // CHUNK

    def walk(read, written, v, scores, stays, start, out, final, kept):
        row, head, worker = (lax.axis_index(name) for name in ("row", "head", "worker"))
        columns = pl.ds(worker * OWN, OWN)

        def order(step):
            return count - 1 - step if reverse else step

        def scoped(held, staged):
            def context(pipeline):
                start_here = plgpu.load(start.at[row, head, :, columns], layout=MATRIX, optimized=False)
                final[row, head, :, columns] = pipeline(start_here)
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, read, written, v, scores, stays, state):
                zero, step = unknown_zero(index[0]), order(index[0])
                room, v = held.at[zero, worker], v.at[:, columns]
                if keep:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copy of the state
                room[...] = state.astype(v.dtype)
                plgpu.commit_smem()
                if keep:
                    send((room, kept[0].at[row, head, step, :, columns]))
                state *= along_rows(plgpu.load(stays, layout=ROWS), state.shape)
                pairs = scores.transpose((1, 0)) if reverse else scores
                part, state = accumulate(
                    (zeros(CHUNK, OWN), (read, room), (pairs, v)),
                    (state, (written.transpose((1, 0)), v)),
                    interpret=interpret,
                )
                plgpu.wait_smem_to_gmem(1 if keep else 0, wait_read_only=True)
                staged.at[zero, worker][...] = part.astype(v.dtype)
                plgpu.commit_smem()
                send((staged.at[zero, worker], out.at[row, pl.ds(step * CHUNK, CHUNK), head, columns]))
                return state

            tokens = [x.at[row, :, head] for x in (read, written, v)] + [scores.at[row, head]]
            pipelined(chunk, tokens, [stays.at[row, head]], context, workers, OWN, 1, order)

        rooms = (matrix(1, workers, height, OWN, tile=OWN) for height in (width, CHUNK))
        pl.run_scoped(scoped, *rooms, collective_axes="worker")

    kept = (jax.ShapeDtypeStruct((b, h, count, width, values), v.dtype),) if keep else ()
    return launch(
        walk,
        name="walk_back" if reverse else "walk",
        out=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32), kept),
        grid={"row": b, "head": h},
        workers=workers,
        interpret=interpret,
    )(read, written, v, scores, stays.reshape(b, h, -1), state)
