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

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.linear_attention.mosaic_gpu import linear_channel_decay as channels
from recallax.pallas_kernels.linear_attention.mosaic_gpu.linear_chunk_loops import (
    LinearKernelConfig,
    linear_backward_loop,
    linear_forward_loop,
)
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import (
    bounded_log2_decay,
    cumulative_decay,
    decay_grad,
    log2_token_decay,
)
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    LaunchConfig,
    choose_num_splits,
    merge_rows,
    merge_rows_head_major,
    split_gates,
    split_initial_states,
    split_rows,
)
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK, launch_kernel

SUPPORTED_HEAD_DIMS = (64, 128)
"""Of keys and of values: what a warpgroup's registers and the tensor cores' tiles are made for."""


class _LinearAttentionInputs(NamedTuple):
    """T is a multiple of the chunk, and the decay is a log2."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    log2_decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H K V"] | None,
    document_ids: DocumentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for Hopper: bfloat16, K and V of 64 or 128."""
    interpret = use_interpreter("gpu")
    width, values, length = q.shape[3], v.shape[3], q.shape[1]
    for name, size in (("K", width), ("V", values)):
        if size not in SUPPORTED_HEAD_DIMS:
            raise Unsupported(f"{name} is {size}; it must be one of {SUPPORTED_HEAD_DIMS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], width, values), jnp.float32)

    per_channel = log_decay is not None and log_decay.shape[3] > 1
    segments = choose_num_splits(v.shape[0] * v.shape[2], -(-length // CHUNK))
    extra = -length % (CHUNK * segments)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    if document_ids is not None:
        document_ids = DocumentIds(
            jnp.pad(document_ids.index, ((0, 0), (0, extra)), mode="edge"), padded(document_ids.valid)
        )
    if log_decay is not None and per_channel:
        decay = padded(bounded_log2_decay(log_decay))
        decay = decay if document_ids is None else jnp.where(document_ids.valid[..., None, None], decay, 0.0)
        inputs = channels.LinearChannelInputs(padded(q), padded(k), padded(v), decay, state)
        out, final = channels.linear_attention_channel_decay(
            LaunchConfig(scale, segments, interpret), inputs, document_ids
        )
        return out[:, :length], final
    decay = None if log_decay is None else padded(log2_token_decay(log_decay))
    inputs = _LinearAttentionInputs(padded(q), padded(k), padded(v), decay, state)
    out, final = _linear_attention(LaunchConfig(scale, segments, interpret), inputs, document_ids)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_attention(config: LaunchConfig, inputs: _LinearAttentionInputs, document_ids: DocumentIds | None):
    return _linear_attention_fwd(config, inputs, document_ids)[0]


def _linear_attention_fwd(config, inputs, document_ids):
    n, (_, k, v, decay, state) = config.num_splits, inputs
    gates = cumulative_decay(decay, document_ids, v.shape[2], CHUNK)
    starts = split_initial_states(k, v, gates, state, n, reverse=False, interpret=config.interpret)
    out, finals = _forward(_split_inputs(inputs, n), split_gates(gates, n), starts, config)
    return (merge_rows(out, n), finals[n - 1 :: n]), (inputs, document_ids)


def _linear_attention_bwd(config, residuals, cotangents):
    """Two walks, as for the forward pass.

    A pair of tokens is in the sums for the decay's gradient twice, as q.dq and as k.dk, and in that gradient only
    where the two do not cancel. So both walks must see one rounding: decays are rounded into the keys of the first and
    into the queries of the second, the sums are of those, pairs within a chunk are float32 in both, and in the
    products for the sums the states have their lower digits too.
    """
    (inputs, docs), n = residuals, config.num_splits
    q, k, v, decay, state = inputs
    grad, state_grad = cotangents
    gates, gated = cumulative_decay(decay, docs, v.shape[2], CHUNK), decay is not None
    state, end = jnp.swapaxes(state, 2, 3), jnp.swapaxes(state_grad, 2, 3)
    starts = split_initial_states(v, k, gates, state, n, reverse=False, interpret=config.interpret)
    ends = split_initial_states(grad, q, gates, end, n, scale=config.scale, reverse=True, interpret=config.interpret)
    gates, parts, grad = split_gates(gates, n), _split_inputs(inputs, n), split_rows(grad, n)
    dq, ascended = _query_gradient(parts, gates, grad, starts, config, has_decay=gated)
    dk, dv, dstates, descended = _key_gradients(parts, gates, grad, jnp.swapaxes(ends, 2, 3), config, has_decay=gated)
    dq, dk, dv = merge_rows(dq, n), merge_rows(dk, n), merge_rows(dv, n)
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    slope = None
    if gated:
        finals, queries = ascended
        at_end = jnp.sum(finals[n - 1 :: n] * end, axis=(2, 3))
        through = jnp.sum(queries, axis=2) - jnp.sum(descended[0], axis=2)
        slope = decay_grad(merge_rows_head_major(through, n), at_end, docs)
    return _LinearAttentionInputs(dq, dk, dv, slope, dstates[::n]), None


_linear_attention.defvjp(_linear_attention_fwd, _linear_attention_bwd)


def _split_inputs(inputs: _LinearAttentionInputs, num_splits: int) -> tuple[Array, Array, Array]:
    return split_rows(inputs.q, num_splits), split_rows(inputs.k, num_splits), split_rows(inputs.v, num_splits)


def _forward(tokens, gates, state, config):
    q, k, v = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = LinearKernelConfig(t, width, values, config.scale, config.interpret, min(width, values) // 64)

    def forward(q, k, v, gates, start, out, final):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = q.at[row, :, group], k.at[row, :, group], v.at[row, :, head]
        gates = [gate.at[row, head] for gate in gates]
        linear_forward_loop(
            sizes, tokens, gates, start.at[row, head], out.at[row, :, head], final_state=final.at[row, head]
        )

    return launch_kernel(
        forward,
        out_type=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        grid={"row": b, "head": h},
        num_consumer_wgs=sizes.num_consumer_wgs,
        interpret=config.interpret,
    )(q, k, v, gates or (), state)


def _query_gradient(tokens, gates, grad, state, config, *, has_decay):
    """The gradient of q per value head. If `has_decay` also the final state transposed and sums for the decay's gradient.

    That is linear attention itself, of the queries `grad`, the keys v, the values k and the transposed state.
    """
    q, k, v = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = LinearKernelConfig(t, values, width, config.scale, config.interpret, min(width, values) // 64)

    def query_gradient(q, k, v, gates, start, grad, dq, kept):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = [grad.at[row, :, head], v.at[row, :, head], k.at[row, :, group]]
        tokens += [q.at[row, :, group]] if has_decay else []
        final, sums = (x.at[row, head] for x in kept) if has_decay else (None, None)
        gates = [gate.at[row, head] for gate in gates]
        linear_forward_loop(
            sizes, tokens, gates, start.at[row, head], dq.at[row, :, head], final_state=final, decay_grad_sums=sums
        )

    kept = (
        jax.ShapeDtypeStruct((b, h, values, width), jnp.float32),
        jax.ShapeDtypeStruct((b, h, sizes.num_consumer_wgs, t), jnp.float32),
    )
    return launch_kernel(
        query_gradient,
        out_type=(jax.ShapeDtypeStruct((b, t, h, width), q.dtype), kept if has_decay else ()),
        grid={"row": b, "head": h},
        num_consumer_wgs=sizes.num_consumer_wgs,
        interpret=config.interpret,
    )(q, k, v, gates or (), state, grad)


def _key_gradients(tokens, gates, grad, state_grad, config, *, has_decay):
    """The gradients of k per value head, of v and of the state; if `has_decay` also sums for the decay's gradient."""
    q, k, v = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = LinearKernelConfig(t, width, values, config.scale, config.interpret, max(width, values) // 64)

    def key_gradients(q, k, v, gates, grad, end, dk, dv, start, sums):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = q.at[row, :, group], k.at[row, :, group], v.at[row, :, head], grad.at[row, :, head]
        dk, dv, start, end = dk.at[row, :, head], dv.at[row, :, head], start.at[row, head], end.at[row, head]
        sums = sums[0].at[row, head] if has_decay else None
        linear_backward_loop(sizes, tokens, [gate.at[row, head] for gate in gates], end, dk, dv, start, sums)

    sums = jax.ShapeDtypeStruct((b, h, sizes.num_consumer_wgs, t), jnp.float32)
    return launch_kernel(
        key_gradients,
        out_type=(
            jax.ShapeDtypeStruct((b, t, h, width), k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state_grad.shape, jnp.float32),
            (sums,) if has_decay else (),
        ),
        grid={"row": b, "head": h},
        num_consumer_wgs=sizes.num_consumer_wgs,
        interpret=config.interpret,
    )(q, k, v, gates or (), grad, state_grad)
