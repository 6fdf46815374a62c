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

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_gpu.channel_decay_backward import channel_decay_grads
from recallax.pallas_kernels.mosaic_gpu.channel_decay_forward import decay_queries_keys
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay, cumulative_decay
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    LaunchConfig,
    merge_rows,
    merge_rows_head_major,
    propagate_split_states,
    split_rows,
    split_rows_head_major,
    split_state_increments,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    WGMMA,
    WGMMA_ROW,
    broadcast_per_row,
    chunk_pipeline,
    copy_smem_to_gmem,
    launch_kernel,
    opaque_zero,
    smem_matrix,
    wgmma_accumulate,
    zero_accumulator,
)

WG_COLUMNS = 64
"""Columns of the values and of the state that a warpgroup has."""


class LinearChannelInputs(NamedTuple):
    """T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log2_decay: Float[Array, "B T H K"]
    """A log2, at least -150."""
    state: Float[Array, "B H K V"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_attention_channel_decay(
    config: LaunchConfig, inputs: LinearChannelInputs, document_ids: DocumentIds | None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The output and the final state."""
    parts = _prepare_chunks(config, inputs, document_ids)
    out, final, _ = _loop_over_splits(parts, inputs.v, inputs.state, config, save_states=False)
    return out, final


def _linear_attention_channel_decay_fwd(config, inputs, document_ids):
    parts = _prepare_chunks(config, inputs, document_ids)
    out, final, (states,) = _loop_over_splits(parts, inputs.v, inputs.state, config, save_states=True)
    return (out, final), (inputs, document_ids, parts, states)


def _linear_attention_channel_decay_bwd(config, residuals, cotangents):
    (inputs, docs, parts, states), (grad, state_grad) = residuals, cotangents
    q, k, v, decay, _ = inputs
    dv, first, (slopes,) = _loop_over_splits(parts, grad, state_grad, config, save_states=True, reverse=True)
    dq, dk, slope = channel_decay_grads(
        q,
        k,
        decay,
        (grad, v),
        (states, slopes),
        parts.chunk_decay,
        _document_gates(docs),
        config.scale,
        interpret=config.interpret,
    )
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    return LinearChannelInputs(dq, dk, dv, slope, first), None


linear_attention_channel_decay.defvjp(_linear_attention_channel_decay_fwd, _linear_attention_channel_decay_bwd)


class _LinearChunkInputs(NamedTuple):
    """What chunks do for themselves."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    scores: Float[Array, "B H T C"]
    chunk_decay: Float[Array, "B H N K"]
    """What is left of a state behind each chunk."""


def _prepare_chunks(
    config: LaunchConfig, inputs: LinearChannelInputs, document_ids: DocumentIds | None
) -> _LinearChunkInputs:
    q, k, _, decay, _ = inputs
    gates = _document_gates(document_ids)
    stays = jnp.sum(decay.reshape(decay.shape[0], -1, CHUNK, *decay.shape[2:]), axis=2)
    if gates is not None:
        stays += gates.query[:, 0, CHUNK - 1 :: CHUNK, None, None]
    parts = decay_queries_keys(q, k, decay, gates, config.scale, interpret=config.interpret)
    return _LinearChunkInputs(parts.q, parts.k, parts.scores, jnp.moveaxis(jnp.exp2(stays), 2, 1))


def _loop_over_splits(parts, v, state, config, *, save_states, reverse=False):
    """`_launch_chunk_loop` over all segments of a row at once, each from the state that it starts from; in reverse queries write
    and keys read."""
    n = config.num_splits
    read, written = (parts.k, parts.q) if reverse else (parts.q, parts.k)
    first = channel_decay_split_states(
        written, v, parts.chunk_decay, state, n, reverse=reverse, interpret=config.interpret
    )
    read, written, v = (split_rows(x, n) for x in (read, written, v))
    scores, stays = (split_rows_head_major(x, n) for x in (parts.scores, parts.chunk_decay))
    out, final, kept = _launch_chunk_loop(
        read, written, v, scores, stays, first, config.interpret, save_states=save_states, reverse=reverse
    )
    return merge_rows(out, n), final[0 if reverse else n - 1 :: n], tuple(merge_rows_head_major(x, n) for x in kept)


def channel_decay_split_states(
    written: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    chunk_decay: Float[Array, "B H N K"],
    state: Float[Array, "B H K V"],
    num_splits: int,
    *,
    reverse: bool,
    interpret: bool,
) -> Float[Array, "M H K V"]:
    """The state that each of the M = B * segments walks starts from."""
    if num_splits == 1:
        return state
    here = split_rows_head_major(chunk_decay, num_splits)
    # What is left of a chunk's part at the other end of its segment: the product over those that come after it.
    others = jnp.roll(here, 1 if reverse else -1, axis=2).at[:, :, 0 if reverse else -1].set(1.0)
    left = merge_rows_head_major(lax.cumprod(others, axis=2, reverse=not reverse), num_splits)
    left = jnp.repeat(jnp.moveaxis(left, 1, 2), CHUNK, axis=1)
    written = (written.astype(jnp.float32) * left).astype(written.dtype)
    parts = split_state_increments(written, v, None, state.shape[1], num_splits, reverse=reverse, interpret=interpret)
    return propagate_split_states(parts, jnp.prod(here, axis=2)[..., None], state, reverse=reverse)


def _document_gates(document_ids: DocumentIds | None) -> CumulativeDecay | None:
    return cumulative_decay(None, document_ids, 1, CHUNK)


def _launch_chunk_loop(read, written, v, scores, chunk_decay, state, interpret, *, save_states, reverse=False):
    """read S + scores v for each chunk, and S <- stays * S + written^T v behind it; if `save_states` also S before each chunk.

    In reverse the scores are transposed.
    """
    (b, t, h, width), values = read.shape, v.shape[3]
    workers, count = values // WG_COLUMNS, t // CHUNK

    def walk(read, written, v, scores, stays, start, out, final, kept):
        row, head, worker = (lax.axis_index(name) for name in ("row", "head", "worker"))
        columns = pl.ds(worker * WG_COLUMNS, WG_COLUMNS)

        def order(step):
            return count - 1 - step if reverse else step

        def scoped(held, staged):
            def context(pipeline):
                start_here = plgpu.load(start.at[row, head, :, columns], layout=WGMMA, optimized=False)
                final[row, head, :, columns] = pipeline(start_here)
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, read, written, v, scores, stays, state):
                zero, step = opaque_zero(index[0]), order(index[0])
                room, v = held.at[zero, worker], v.at[:, columns]
                if save_states:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # for the last chunk's copy of the state
                room[...] = state.astype(v.dtype)
                plgpu.commit_smem()
                if save_states:
                    copy_smem_to_gmem((room, kept[0].at[row, head, step, :, columns]))
                state *= broadcast_per_row(plgpu.load(stays, layout=WGMMA_ROW), state.shape)
                pairs = scores.transpose((1, 0)) if reverse else scores
                part, state = wgmma_accumulate(
                    (zero_accumulator(CHUNK, WG_COLUMNS), (read, room), (pairs, v)),
                    (state, (written.transpose((1, 0)), v)),
                    interpret=interpret,
                )
                plgpu.wait_smem_to_gmem(1 if save_states else 0, wait_read_only=True)
                staged.at[zero, worker][...] = part.astype(v.dtype)
                plgpu.commit_smem()
                copy_smem_to_gmem((staged.at[zero, worker], out.at[row, pl.ds(step * CHUNK, CHUNK), head, columns]))
                return state

            tokens = [x.at[row, :, head] for x in (read, written, v)] + [scores.at[row, head]]
            chunk_pipeline(chunk, tokens, [stays.at[row, head]], context, workers, WG_COLUMNS, 1, order)

        rooms = (smem_matrix(1, workers, height, WG_COLUMNS, tile=WG_COLUMNS) for height in (width, CHUNK))
        pl.run_scoped(scoped, *rooms, collective_axes="worker")

    kept = (jax.ShapeDtypeStruct((b, h, count, width, values), v.dtype),) if save_states else ()
    return launch_kernel(
        walk,
        name="walk_back" if reverse else "walk",
        out_type=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32), kept),
        grid={"row": b, "head": h},
        num_consumer_wgs=workers,
        interpret=interpret,
    )(read, written, v, scores, chunk_decay.reshape(b, h, -1), state)
