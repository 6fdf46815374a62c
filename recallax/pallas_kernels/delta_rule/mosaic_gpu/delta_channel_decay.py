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

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import (
    WG_COLUMNS,
    DeltaKernelConfig,
    DeltaResiduals,
    delta_channel_backward_loop,
    delta_channel_forward_loop,
)
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_sequence_splits import (
    backward_split_grads,
    forward_split_states,
    merge_residuals,
)
from recallax.pallas_kernels.mosaic_gpu.channel_decay_backward import channel_decay_grads
from recallax.pallas_kernels.mosaic_gpu.channel_decay_forward import decay_erase_keys, decay_queries_keys
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay, cumulative_decay
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    LaunchConfig,
    merge_rows,
    split_rows,
    split_rows_head_major,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK, launch_kernel


class DeltaChannelInputs(NamedTuple):
    """T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    erase_k: Float[Array, "B T H K"]
    """What erases."""
    v: Float[Array, "B T H V"]
    write: Float[Array, "B T H"]
    log2_decay: Float[Array, "B T H K"]
    """A log2, at least -150."""
    state: Float[Array, "B H K V"]


class _DeltaChunkInputs(NamedTuple):
    """What chunks do for themselves, as the walks take it."""

    q: Float[Array, "B T H K"]
    erase_k: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    scores: Float[Array, "B H T C"]
    inverse: Float[Array, "B H T D"]
    chunk_decay: Float[Array, "B H N K"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_rule_channel_decay(
    config: LaunchConfig, inputs: DeltaChannelInputs, document_ids: DocumentIds | None
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The output and the final state."""
    return _forward(
        config, inputs, _prepare_chunks(config.scale, config.interpret, inputs, document_ids), save_residuals=False
    )[:2]


def _delta_rule_channel_decay_fwd(config, inputs, document_ids):
    parts = _prepare_chunks(config.scale, config.interpret, inputs, document_ids)
    out, final, kept, through = _forward(config, inputs, parts, save_residuals=True)
    return (out, final), (inputs, document_ids, parts, kept, through)


def _delta_rule_channel_decay_bwd(config, residuals, cotangents):
    (inputs, docs, parts, (new, states), through), (grad, state_grad) = residuals, cotangents
    q, k, e, v, write, decay, _ = inputs
    gates = _document_gates(docs)
    slope, slopes, first = _backward(config, parts, through, grad, state_grad)
    shared = functools.partial(channel_decay_grads, interpret=config.interpret)
    dq, dk, ddecay = shared(q, k, decay, (grad, new), (states, slopes), parts.chunk_decay, gates, config.scale)
    de, dk_erased, ddecay_erased = shared(e, k, decay, (slope, new), (states,), parts.chunk_decay, gates, -1.0)
    dk = dk.astype(jnp.float32) + dk_erased.astype(jnp.float32)
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    wanted = slope.astype(jnp.float32)
    dv, dwrite = (wanted * write[..., None]).astype(v.dtype), jnp.sum(wanted * v.astype(jnp.float32), axis=3)
    return DeltaChannelInputs(dq, dk, de, dv, dwrite, ddecay + ddecay_erased, first), None


delta_rule_channel_decay.defvjp(_delta_rule_channel_decay_fwd, _delta_rule_channel_decay_bwd)


def _document_gates(document_ids: DocumentIds | None) -> CumulativeDecay | None:
    return cumulative_decay(None, document_ids, 1, CHUNK)


def _prepare_chunks(
    scale: float, interpret: bool, inputs: DeltaChannelInputs, document_ids: DocumentIds | None
) -> _DeltaChunkInputs:
    q, k, e, _, _, decay, _ = inputs
    gates = _document_gates(document_ids)
    reading = decay_queries_keys(q, k, decay, gates, scale, interpret=interpret)
    erased = decay_erase_keys(e, k, decay, gates, interpret=interpret)
    stays = jnp.sum(decay.reshape(decay.shape[0], -1, CHUNK, *decay.shape[2:]), axis=2)
    if gates is not None:
        stays += gates.query[:, 0, CHUNK - 1 :: CHUNK, None, None]
    stays = jnp.moveaxis(jnp.exp2(stays), 2, 1)
    return _DeltaChunkInputs(reading.q, erased.erase_k, reading.k, reading.scores, erased.inverse, stays)


def _split_chunk_inputs(parts: _DeltaChunkInputs, num_splits: int) -> _DeltaChunkInputs:
    q, e, k = (split_rows(x, num_splits) for x in parts[:3])
    return _DeltaChunkInputs(q, e, k, *(split_rows_head_major(x, num_splits) for x in parts[3:]))


def _forward(config, inputs, parts, *, save_residuals):
    """The output, the final state, if wanted U and the states before the chunks, and what segments do to a state."""
    n, interpret = config.num_splits, config.interpret
    parts, v, write = (
        _split_chunk_inputs(parts, n),
        split_rows(inputs.v, n),
        split_rows_head_major(jnp.moveaxis(inputs.write, 2, 1), n),
    )

    def final_of(v, write, state):
        return _launch_forward(interpret, parts, v, write, state, save_residuals=False)[1]

    first, through = forward_split_states(final_of, v, write, parts.k, inputs.state)
    out, final, kept = _launch_forward(interpret, parts, v, write, first, save_residuals=save_residuals)
    return merge_rows(out, n), final[n - 1 :: n], merge_residuals(kept, n), through


def _launch_forward(interpret, parts, v, write, state, *, save_residuals):
    """`delta_channel_forward_loop` for all heads and rows."""
    (b, t, h, values), width = v.shape, state.shape[2]
    sizes = DeltaKernelConfig(t, width, WG_COLUMNS, 1.0, interpret)

    def forward(q, e, k, scores, inverse, stays, v, write, start, out, final, kept):
        row, head, columns = _block_position()
        tokens = [x.at[row, :, head] for x in (q, e, k)] + [v.at[row, :, head, columns]]
        tokens += [x.at[row, head] for x in (scores, inverse)]
        vectors = [x.at[row, head] for x in (stays, write)]
        left = (
            DeltaResiduals(kept[0].at[row, :, head, columns], kept[1].at[row, head, :, :, columns])
            if save_residuals
            else None
        )
        start, final = (x.at[row, head, :, columns] for x in (start, final))
        delta_channel_forward_loop(sizes, tokens, vectors, start, out.at[row, :, head, columns], final, left)

    chosen = jax.ShapeDtypeStruct(v.shape, v.dtype), _chunk_states_shape(b, h, t, width, values)
    return launch_kernel(
        forward,
        out_type=(chosen[0], jax.ShapeDtypeStruct(state.shape, jnp.float32), chosen if save_residuals else ()),
        grid={"row": b, "head": h, "part": values // WG_COLUMNS},
        num_consumer_wgs=1,
        interpret=interpret,
    )(*parts[:-1], parts.chunk_decay.reshape(b, h, -1), v, write, state)


def _backward(config, parts, transitions, grad, state_grad):
    """The gradients of w V, of the states behind the chunks, and of the first state."""
    n = config.num_splits
    walked = functools.partial(_launch_backward, config.interpret, _split_chunk_inputs(parts, n), split_rows(grad, n))
    slope, slopes, first = walked(backward_split_grads(lambda state: walked(state)[2], transitions, state_grad))
    return *merge_residuals((slope, slopes), n), first[::n]


def _launch_backward(interpret, parts, grad, state_grad):
    """`delta_channel_backward_loop` for all heads and rows."""
    (b, t, h, values), width = grad.shape, state_grad.shape[2]
    sizes = DeltaKernelConfig(t, width, WG_COLUMNS, 1.0, interpret)

    def backward(q, e, k, scores, inverse, stays, grad, end, slope, slopes, first):
        row, head, columns = _block_position()
        tokens = [x.at[row, :, head] for x in (q, e, k)] + [grad.at[row, :, head, columns]]
        tokens += [x.at[row, head] for x in (scores, inverse)]
        kept = DeltaResiduals(slope.at[row, :, head, columns], slopes.at[row, head, :, :, columns])
        end, first = (x.at[row, head, :, columns] for x in (end, first))
        delta_channel_backward_loop(sizes, tokens, [stays.at[row, head]], end, first, kept)

    return launch_kernel(
        backward,
        out_type=(
            jax.ShapeDtypeStruct(grad.shape, grad.dtype),
            _chunk_states_shape(b, h, t, width, values),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
        ),
        grid={"row": b, "head": h, "part": values // WG_COLUMNS},
        num_consumer_wgs=1,
        interpret=interpret,
    )(*parts[:-1], parts.chunk_decay.reshape(b, h, -1), grad, state_grad)


def _block_position():
    """Row, head and columns of the values of a block."""
    return lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * WG_COLUMNS, WG_COLUMNS)


def _chunk_states_shape(b, h, t, width, values):
    return jax.ShapeDtypeStruct((b, h, t // CHUNK, width, values), jnp.bfloat16)
