"""Forward pass of linear attention with a decay per token: one block per head, chunk by chunk.

The loop over the chunks of a head also computes the gradient of the queries, with other arguments (`backward.py`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.mosaic_gpu.chunk_pipeline import chunk_pipeline
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import CumulativeDecay, cumulative_decay
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, launch_kernel
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    merge_rows,
    split_gates,
    split_initial_states,
    split_rows,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import (
    CHUNK,
    CHUNK_SHAPE,
    WGMMA,
    WGMMA_ROW,
    broadcast_per_row,
    opaque_zero,
    pair_decay,
    round_to_dtype,
    row_and_column_iota,
    scale_rows,
    shared_group,
    smem_matrix,
    store_through_smem,
    wgmma_accumulate,
    zero_accumulator,
)

MIN_DIM = 64
"""Narrowest keys and values; with both this narrow, shared memory holds more chunks."""
NUM_PREFETCH, NUM_PREFETCH_NARROW = 1, 3
"""Chunks that TMA loads ahead, in general and with narrow keys and values."""


class LinearAttentionInputs(NamedTuple):
    """Differentiable inputs. T is a multiple of the chunk."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log2_decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


class LinearTokens(NamedTuple):
    """Per-token arrays of a launch, in which every split is a row; in a kernel, references to them."""

    q: Float[Array, "N S G K"]
    k: Float[Array, "N S G K"]
    v: Float[Array, "N S H V"]
    gates: CumulativeDecay | tuple[()]

    @classmethod
    def from_inputs(
        cls, inputs: LinearAttentionInputs, gates: CumulativeDecay | None, num_splits: int
    ) -> "LinearTokens":
        """Split the rows of the inputs and of their gates."""
        gates = split_gates(gates, num_splits)
        q, k, v = (split_rows(x, num_splits) for x in inputs[:3])
        return cls(q, k, v, gates or ())

    def of_head(self, row: Array, head: Array) -> "LinearTokens":
        """Return references to one value head and its queries and keys: [S, width] each, and gates [S]."""
        refs: Any = self
        group = shared_group(head, self.v.shape[2], self.q.shape[2])
        gates = [gate.at[row, head] for gate in refs.gates]
        return LinearTokens._make((refs.q.at[row, :, group], refs.k.at[row, :, group], refs.v.at[row, :, head], gates))


class LinearLoopConfig(NamedTuple):
    """Sizes of the loop over the chunks of one head."""

    num_tokens: int
    head_k_dim: int
    head_v_dim: int
    scale: float
    num_consumer_wgs: int
    """Computing warpgroups: the columns of the state and of each product are divided among them."""

    @property
    def column_tile(self) -> int:
        """Columns of a shared-memory tile: every matrix can be sliced at its multiples."""
        return min(64, self.head_k_dim // self.num_consumer_wgs, self.head_v_dim // self.num_consumer_wgs)


def linear_attention_primal(config: LaunchConfig, inputs: LinearAttentionInputs, document_ids: DocumentIds | None):
    """Return the output and the final state."""
    return linear_attention_fwd(config, inputs, document_ids)[0]


def linear_attention_fwd(config: LaunchConfig, inputs: LinearAttentionInputs, document_ids: DocumentIds | None):
    """Return the output and the final state, and the inputs as residuals."""
    n, (_, k, v, decay, state) = config.num_splits, inputs
    gates = cumulative_decay(decay, document_ids, v.shape[2])
    initial_states = split_initial_states(k, v, gates, state, n, reverse=False)
    out, final_states = _launch_forward(LinearTokens.from_inputs(inputs, gates, n), initial_states, config.scale)
    return (merge_rows(out, n), final_states[n - 1 :: n]), (inputs, document_ids)


def _launch_forward(tokens: LinearTokens, state, scale):
    (rows, length, heads, v_dim), k_dim = tokens.v.shape, tokens.q.shape[3]
    config = LinearLoopConfig(length, k_dim, v_dim, scale, min(k_dim, v_dim) // MIN_DIM)

    def forward(tokens, initial_state, out, final_state):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        *qkv, gates = tokens.of_head(row, head)
        initial_state, final_state = initial_state.at[row, head], final_state.at[row, head]
        linear_forward_loop(config, qkv, gates, initial_state, out.at[row, :, head], final_state=final_state)

    return launch_kernel(
        forward,
        out_type=(
            jax.ShapeDtypeStruct(tokens.v.shape, tokens.v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        grid={"row": rows, "head": heads},
        num_consumer_wgs=config.num_consumer_wgs,
    )(tokens, state)


def linear_forward_loop(
    config: LinearLoopConfig, tokens, gates, initial_state, out, *, final_state=None, decay_grad_sums=None
) -> None:
    """Process the chunks of one head forward in time, in a block of threads.

    Args:
        config: Sizes.
        tokens: References to q, k and v, [T, width] each in global memory; with `decay_grad_sums` also to x, of v's
            width.
        gates: References to the cumulative decays [T] for queries and for keys; empty: no decay.
        initial_state: Reference [K, V], float32.
        out: Reference [T, V] to the output.
        final_state: Reference [K, V] to the final state; None: it is not stored.
        decay_grad_sums: Reference [warpgroups, T], float32: x.output of each token, over the columns of each warpgroup,
            for the gradient of the decay; None: it is not computed.
    """
    num_wgs, warpgroup = config.num_consumer_wgs, lax.axis_index("warpgroup")
    wg_columns = config.head_v_dim // num_wgs
    columns = pl.ds(warpgroup * wg_columns, wg_columns)

    def scoped(state_smem, state_lo_smem, decayed_smem, out_smem):
        def context(pipeline):
            state = pipeline(plgpu.load(initial_state.at[:, columns], layout=WGMMA, optimized=False))
            if final_state is not None:
                final_state[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def chunk(index, *refs):
            q, k, v, *x = refs[: len(tokens)]
            v, x = v.at[:, columns], x[0].at[:, columns] if x else None
            *gates, state = refs[len(tokens) :]
            scratch = [
                None if x is None else x.at[opaque_zero(index[0]), warpgroup]
                for x in (state_smem, state_lo_smem, decayed_smem)
            ]
            chunk_out, grad_sums, state = _forward_chunk(config.scale, (q, k, v, x), gates, state, scratch)
            time = pl.ds(index[0] * CHUNK, CHUNK)
            if decay_grad_sums is not None:
                decay_grad_sums[warpgroup, time] = grad_sums
            store_through_smem((out_smem.at[warpgroup], chunk_out, out.at[time, columns]))
            return state

        narrow = decay_grad_sums is None and config.head_k_dim + config.head_v_dim == 2 * MIN_DIM
        num_prefetch = NUM_PREFETCH_NARROW if narrow else NUM_PREFETCH
        chunk_pipeline(
            chunk, tokens, gates, context, num_wgs, config.column_tile, num_prefetch, chunk_order=lambda step: step
        )

    tile = config.column_tile
    state_smem = smem_matrix(1, num_wgs, config.head_k_dim, wg_columns, tile=tile)
    pl.run_scoped(
        scoped,
        state_smem,
        None if decay_grad_sums is None else state_smem,
        smem_matrix(1, num_wgs, CHUNK, wg_columns, tile=tile),
        smem_matrix(num_wgs, CHUNK, wg_columns, tile=tile),
        collective_axes="warpgroup",
    )


def _forward_chunk(scale, tokens, gates, state, scratch):
    """Return the output of one chunk, its sums with x or None, and the state after it.

    scratch: for the state as an operand, for its rounding error or None, and for the values decayed to the chunk's end.
    """
    (q, k, v, x), (state_smem, state_lo_smem, decayed) = tokens, scratch
    shape, dtype = v.shape, v.dtype
    state_smem[...] = state.astype(dtype)
    if gates:
        query_decay, chunk_decay = plgpu.load(gates[0], layout=WGMMA_ROW), plgpu.load(gates[0].at[CHUNK - 1])
        decay_to_end = jnp.exp2(chunk_decay - plgpu.load(gates[1], layout=WGMMA_ROW))
        decayed[...] = scale_rows(v, decay_to_end).astype(dtype)
    else:
        decayed = v
    if x is not None:
        state_lo_smem[...] = (state - round_to_dtype(state, dtype)).astype(dtype)
    plgpu.commit_smem()
    query, key = row_and_column_iota(CHUNK_SHAPE)
    visible = query >= key

    def decay_scores(scores):
        if not gates:
            return jnp.where(visible, scores, 0.0)
        return scores * pair_decay(query_decay, gates[1], visible)

    scores, out = (
        (zero_accumulator(*CHUNK_SHAPE), (q, k.transpose((1, 0)))),
        (zero_accumulator(*shape), (q, state_smem)),
    )
    sums = None
    if x is None:
        scores, out = wgmma_accumulate(scores, out)
        scores = decay_scores(scores).astype(dtype)
    else:  # in two steps: one would need more registers than there are
        scores, score_grads = wgmma_accumulate(scores, (zero_accumulator(*CHUNK_SHAPE), (x, v.transpose((1, 0)))))
        scores = decay_scores(scores)
        sums = jnp.sum(scores * score_grads, axis=1) * scale
        scores = scores.astype(dtype)
        (out,) = wgmma_accumulate((*out, (q, state_lo_smem)))
        decayed_x = scale_rows(x, jnp.exp2(query_decay), scale=scale)
        sums += jnp.sum(out * decayed_x, axis=1)
    if gates:
        out *= broadcast_per_row(jnp.exp2(query_decay), shape)
        state *= jnp.exp2(chunk_decay)
    out, state = wgmma_accumulate((out, (scores, v)), (state, (k.transpose((1, 0)), decayed)))
    return (out * scale).astype(dtype), sums, state
