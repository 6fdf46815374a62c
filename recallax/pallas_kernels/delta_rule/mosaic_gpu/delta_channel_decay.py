"""The delta rule with decays, or erase strengths, per channel on Hopper (KDA).

    U = T (w V - E~ S)        O = Q~ S + P U        S <- Diag(2^L_C) S + K~^T U

with E = b K. As in linear attention, a first kernel computes all chunks' Q~, E~, K~, scores P and inverses T
(`channel_decay_forward.py`). Erase keys read the keys before their own as queries read those up to their own, so their
gradients are those of linear attention for the output gradient -dW (`delta_chunk_loops.py`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.delta_rule.mosaic_gpu.backward import written_value_grads
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import (
    ResidualRefs,
    chunk_states_shape,
    delta_channel_backward_loop,
    delta_channel_forward_loop,
)
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_sequence_splits import (
    backward_split_grads,
    forward_split_states,
    merge_residuals,
)
from recallax.pallas_kernels.mosaic_gpu.channel_decay_backward import ChannelGradInputs, channel_decay_grads
from recallax.pallas_kernels.mosaic_gpu.channel_decay_forward import (
    chunk_state_decay,
    decay_erase_keys,
    decay_queries_keys,
)
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import document_gates
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import sum_shared_heads
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import merge_rows, split_rows, split_rows_head_major
from recallax.pallas_kernels.mosaic_gpu.state_chunk_loop import WG_COLUMNS, StateLoopConfig

UNIT_SCALE = 1.0
"""Scale of the loops: queries and scores are scaled before them."""


class DeltaChannelInputs(NamedTuple):
    """Differentiable inputs. T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    erase_k: Float[Array, "B T H K"]
    """Keys times erase strengths."""
    v: Float[Array, "B T H V"]
    write: Float[Array, "B T H"]
    log2_decay: Float[Array, "B T H K"]
    """At least `MIN_LOG2_DECAY`."""
    state: Float[Array, "B H K V"]


class _DeltaChunkInputs(NamedTuple):
    """Inputs of the loops that a kernel computes for all chunks; in a loop's kernel, references to them."""

    q: Float[Array, "B T H K"]
    erase_k: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    scores: Float[Array, "B H T C"]
    inverse: Float[Array, "B H T D"]
    chunk_decay: Float[Array, "B H N K"]
    """Decay of the state over each chunk."""

    def split(self, num_splits: int) -> "_DeltaChunkInputs":
        """Make every split a row."""
        head_major = (split_rows_head_major(x, num_splits) for x in self[3:])
        return _DeltaChunkInputs(*(split_rows(x, num_splits) for x in self[:3]), *head_major)

    def flat(self) -> "_DeltaChunkInputs":
        """Join the chunks and channels of the decays, which the pipeline loads as vectors."""
        return self._replace(chunk_decay=self.chunk_decay.reshape(*self.chunk_decay.shape[:2], -1))

    def of_block(self, values: Any, position: tuple[Any, Any, Any]) -> list:
        """Return references of a block to the matrices, with its part of the values [B, T, H, V] among them."""
        row, head, columns = position
        tokens = [x.at[row, :, head] for x in (self.q, self.erase_k, self.k)] + [values.at[row, :, head, columns]]
        return tokens + [x.at[row, head] for x in (self.scores, self.inverse)]


def _primal(config: LaunchConfig, inputs: DeltaChannelInputs, document_ids: DocumentIds | None):
    """Return the output and the final state."""
    chunks = _prepare_chunks(config.scale, inputs, document_ids)
    return _forward(config.num_splits, inputs, chunks, save_residuals=False)[:2]


def _fwd(config, inputs, document_ids):
    chunks = _prepare_chunks(config.scale, inputs, document_ids)
    out, final_state, saved, transitions = _forward(config.num_splits, inputs, chunks, save_residuals=True)
    return (out, final_state), (inputs, document_ids, chunks, saved, transitions)


def _bwd(config, residuals, output_grads):
    (inputs, document_ids, chunks, (v_new, states), transitions), (out_grad, state_grad) = residuals, output_grads
    q, k, erase_k, v, write, decay, _ = inputs
    gates = document_gates(document_ids) or ()
    write_grad, state_grads, dstate = _backward(config.num_splits, chunks, transitions, out_grad, state_grad)
    readers = ChannelGradInputs(q, k, decay, (out_grad, v_new), (states, state_grads), gates)
    dq, dk, ddecay = channel_decay_grads(readers, chunks.chunk_decay, config.scale)
    erasers = ChannelGradInputs(erase_k, k, decay, (write_grad, v_new), (states,), gates)
    derase_k, dk_erased, ddecay_erased = channel_decay_grads(erasers, chunks.chunk_decay, -1.0)
    dk = dk.astype(jnp.float32) + dk_erased.astype(jnp.float32)
    dq, dk = sum_shared_heads(dq, q), sum_shared_heads(dk, q)
    dv, dwrite = written_value_grads(write_grad, v, write)
    return DeltaChannelInputs(dq, dk, derase_k, dv, dwrite, ddecay + ddecay_erased, dstate), None


delta_rule_channel_decay = kernel_custom_vjp(_primal, _fwd, _bwd)


def _prepare_chunks(scale: float, inputs: DeltaChannelInputs, document_ids: DocumentIds | None) -> _DeltaChunkInputs:
    """Return the inputs of the loops."""
    gates, decay = document_gates(document_ids), inputs.log2_decay
    read = decay_queries_keys(inputs.q, inputs.k, decay, gates, scale)
    erased = decay_erase_keys(inputs.erase_k, inputs.k, decay, gates)
    chunk_decay = chunk_state_decay(decay, gates)
    return _DeltaChunkInputs(read.q, erased.erase_k, read.k, read.scores, erased.inverse, chunk_decay)


def _forward(num_splits, inputs: DeltaChannelInputs, chunks: _DeltaChunkInputs, *, save_residuals):
    """Return the output, the final state, U and the states before the chunks if wanted, and the splits' transitions."""
    n = num_splits
    chunks, v = chunks.split(n), split_rows(inputs.v, n)
    write = split_rows_head_major(jnp.moveaxis(inputs.write, 2, 1), n)

    def final_states(v, write, state):
        return _launch_forward(chunks, v, write, state, save_residuals=False)[1]

    initial_states, transitions = forward_split_states(final_states, v, write, chunks.k, inputs.state)
    out, final_state, saved = _launch_forward(chunks, v, write, initial_states, save_residuals=save_residuals)
    return merge_rows(out, n), final_state[n - 1 :: n], merge_residuals(saved, n), transitions


def _launch_forward(chunks: _DeltaChunkInputs, v, write, state, *, save_residuals):
    """Run `delta_channel_forward_loop` on all rows, heads and blocks of values."""
    (b, t, h, v_dim), k_dim = v.shape, state.shape[2]
    config = StateLoopConfig(t, k_dim, WG_COLUMNS, UNIT_SCALE)

    def forward(chunks, v, write, initial_state, out, final_state, saved):
        position = row, head, columns = _block_position()
        tokens = chunks.of_block(v, position)
        vectors = [x.at[row, head] for x in (chunks.chunk_decay, write)]
        residuals = None
        if save_residuals:
            residuals = ResidualRefs(saved[0].at[row, :, head, columns], saved[1].at[row, head, :, :, columns])
        initial_state, final_state = (x.at[row, head, :, columns] for x in (initial_state, final_state))
        out = out.at[row, :, head, columns]
        delta_channel_forward_loop(config, tokens, vectors, initial_state, out, final_state, residuals)

    out = jax.ShapeDtypeStruct(v.shape, v.dtype)
    return launch_kernel(
        forward,
        out_type=(
            out,
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            (out, chunk_states_shape(b, h, t, k_dim, v_dim)) if save_residuals else (),
        ),
        grid={"row": b, "head": h, "part": v_dim // WG_COLUMNS},
        num_consumer_wgs=1,
    )(chunks.flat(), v, write, state)


def _backward(num_splits, chunks: _DeltaChunkInputs, transitions, out_grad, state_grad):
    """Return the gradients of w V, of the states after the chunks, and of the initial state."""
    n = num_splits
    launch = functools.partial(_launch_backward, chunks.split(n), split_rows(out_grad, n))
    final_grads = backward_split_grads(lambda grad: launch(grad)[2], transitions, state_grad)
    write_grad, state_grads, initial_grads = launch(final_grads)
    return *merge_residuals((write_grad, state_grads), n), initial_grads[::n]


def _launch_backward(chunks: _DeltaChunkInputs, out_grad, state_grad):
    """Run `delta_channel_backward_loop` on all rows, heads and blocks of values."""
    (b, t, h, v_dim), k_dim = out_grad.shape, state_grad.shape[2]
    config = StateLoopConfig(t, k_dim, WG_COLUMNS, UNIT_SCALE)

    def backward(chunks, out_grad, final_grad, write_grad, state_grads, initial_grad):
        position = row, head, columns = _block_position()
        tokens = chunks.of_block(out_grad, position)
        residuals = ResidualRefs(write_grad.at[row, :, head, columns], state_grads.at[row, head, :, :, columns])
        final_grad, initial_grad = (x.at[row, head, :, columns] for x in (final_grad, initial_grad))
        vectors = [chunks.chunk_decay.at[row, head]]
        delta_channel_backward_loop(config, tokens, vectors, final_grad, initial_grad, residuals)

    return launch_kernel(
        backward,
        out_type=(
            jax.ShapeDtypeStruct(out_grad.shape, out_grad.dtype),
            chunk_states_shape(b, h, t, k_dim, v_dim),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
        ),
        grid={"row": b, "head": h, "part": v_dim // WG_COLUMNS},
        num_consumer_wgs=1,
    )(chunks.flat(), out_grad, state_grad)


def _block_position():
    """Return the row, the head and the columns of the values of this block."""
    return lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * WG_COLUMNS, WG_COLUMNS)
