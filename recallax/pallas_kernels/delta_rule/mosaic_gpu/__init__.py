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

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.delta_rule.mosaic_gpu import delta_channel_decay as channels
from recallax.pallas_kernels.delta_rule.mosaic_gpu.backward import delta_chunk_grads
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_chunk_loops import (
    DeltaKernelConfig,
    DeltaResiduals,
    delta_backward_loop,
    delta_forward_loop,
)
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_sequence_splits import (
    backward_split_grads,
    choose_num_delta_splits,
    forward_split_states,
    merge_residuals,
)
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import (
    bounded_log2_decay,
    chunkwise_decay_grad,
    cumulative_decay,
    log2_token_decay,
)
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    LaunchConfig,
    merge_rows,
    split_rows,
    split_rows_head_major,
)
from recallax.pallas_kernels.mosaic_gpu.triangular_inverse import chunk_inverses
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK, launch_kernel

SUPPORTED_HEAD_DIMS = (64, 128)
"""Of keys and of values: what a warpgroup's registers and the tensor cores' tiles are made for."""


class _DeltaRuleInputs(NamedTuple):
    """T is a multiple of the chunk, and the decay is a log2."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    erase: Float[Array, "B T H"]
    write: Float[Array, "B T H"]
    log2_decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    erase: Float[Array, "B T H W"],
    write: Float[Array, "B T H 1"],
    log_decay: Float[Array, "B T H W2"] | None,
    state: Float[Array, "B H K V"],
    document_ids: DocumentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for Hopper: bfloat16, K and V of 64 or 128, any strengths and decays."""
    interpret = use_interpreter("gpu")
    for name, size in (("K", q.shape[3]), ("V", v.shape[3])):
        if size not in SUPPORTED_HEAD_DIMS:
            raise Unsupported(f"{name} is {size}; it must be one of {SUPPORTED_HEAD_DIMS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    length = q.shape[1]
    segments = choose_num_delta_splits(v.shape[0] * v.shape[2], -(-length // CHUNK))
    extra = -length % (CHUNK * segments)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    erase, write = erase.astype(jnp.float32), write.astype(jnp.float32)
    valid = True if document_ids is None else document_ids.valid[..., None, None]
    if document_ids is not None:  # padding neither erases nor writes
        erase, write = (jnp.where(valid, x, 0.0) for x in (erase, write))
        document_ids = DocumentIds(
            jnp.pad(document_ids.index, ((0, 0), (0, extra)), mode="edge"), padded(document_ids.valid)
        )
    if max(erase.shape[3], 0 if log_decay is None else log_decay.shape[3]) > 1:
        shape = (*v.shape[:3], q.shape[3])
        decay = (
            jnp.zeros(shape, jnp.float32)
            if log_decay is None
            else jnp.broadcast_to(bounded_log2_decay(log_decay), shape)
        )
        decay = jnp.where(valid, decay, 0.0)  # nor does padding decay
        e = (jnp.repeat(k, v.shape[2] // k.shape[2], axis=2).astype(jnp.float32) * erase).astype(k.dtype)
        q, k, e, v, write, decay = (padded(x) for x in (q, k, e, v, write[..., 0], decay))
        inputs = channels.DeltaChannelInputs(q, k, e, v, write, decay, state)
        out, final = channels.delta_rule_channel_decay(LaunchConfig(scale, segments, interpret), inputs, document_ids)
        return out[:, :length], final
    decay = None if log_decay is None else padded(log2_token_decay(log_decay))
    inputs = _DeltaRuleInputs(
        padded(q), padded(k), padded(v), padded(erase[..., 0]), padded(write[..., 0]), decay, state
    )
    out, final = _delta_rule(LaunchConfig(scale, segments, interpret), inputs, document_ids)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(config: LaunchConfig, inputs: _DeltaRuleInputs, document_ids: DocumentIds | None):
    gates, erase = _gates_and_erase(inputs, document_ids)
    inverse = chunk_inverses(inputs.k, gates, erase, interpret=config.interpret)
    return _forward(config, inputs, gates, inverse, save_residuals=False)[:2]


def _delta_rule_fwd(config, inputs, document_ids):
    gates, erase = _gates_and_erase(inputs, document_ids)
    inverse = chunk_inverses(inputs.k, gates, erase, interpret=config.interpret)
    out, final, kept, through = _forward(config, inputs, gates, inverse, save_residuals=True)
    return (out, final), (inputs, document_ids, inverse, kept, through)


def _delta_rule_bwd(config, residuals, cotangents):
    (inputs, docs, inverse, (new, states), through), (grad, state_grad) = residuals, cotangents
    q, k, v, _, write, decay, _ = inputs
    gates, erase = _gates_and_erase(inputs, docs)
    slope, slopes, first = _backward(config, inputs, gates, inverse, through, grad, state_grad)
    parts = delta_chunk_grads(
        q, k, (grad, new, slope), (states, slopes), gates, erase, config.scale, interpret=config.interpret
    )
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in parts[:2])
    wanted = slope.astype(jnp.float32)
    dv, dwrite = (wanted * write[..., None]).astype(v.dtype), jnp.sum(wanted * v.astype(jnp.float32), axis=3)
    decay_slope = None
    if decay is not None:
        ends = jnp.sum(parts.decay_at_chunk_end.reshape(*parts.decay_at_chunk_end.shape[:3], -1, CHUNK), axis=(2, 4))
        decay_slope = chunkwise_decay_grad(jnp.sum(parts.decay_in_chunk, axis=2), ends, docs)
    return _DeltaRuleInputs(
        dq, dk, dv, jnp.moveaxis(jnp.sum(parts.erase, axis=2), 1, 2), dwrite, decay_slope, first
    ), None


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd)


def _gates_and_erase(inputs: _DeltaRuleInputs, document_ids: DocumentIds | None):
    """The gates, and the strength of erasing with time last."""
    return cumulative_decay(inputs.log2_decay, document_ids, inputs.v.shape[2], CHUNK), jnp.moveaxis(inputs.erase, 2, 1)


def _forward(config, inputs, gates, inverse, *, save_residuals):
    """The output, the final state, if wanted U and the states before the chunks, and what segments do to a state."""
    n, (q, k, v, erase, write, _, state) = config.num_splits, inputs
    q, k, v, inverse = split_rows(q, n), split_rows(k, n), split_rows(v, n), split_rows_head_major(inverse, n)
    *vectors, write = (
        split_rows_head_major(x, n) for x in (*(gates or ()), *(jnp.moveaxis(x, 2, 1) for x in (erase, write)))
    )

    def ascended(v, write, state, keep):
        return _launch_forward(config, (q, k, v, inverse), (*vectors, write), state, keep)

    keys = jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
    first, through = forward_split_states(
        lambda v, write, start: ascended(v, write, start, False)[1], v, write, keys, state
    )
    out, final, kept = ascended(v, write, first, save_residuals)
    return merge_rows(out, n), final[n - 1 :: n], merge_residuals(kept, n), through


def _launch_forward(config, tokens, vectors, state, save_residuals):
    """`ascend` for all heads and rows."""
    q, _, v, _ = tokens
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = DeltaKernelConfig(t, width, values, config.scale, config.interpret)

    def forward(q, k, v, inverse, vectors, start, out, final, kept):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = [q.at[row, :, group], k.at[row, :, group], v.at[row, :, head], inverse.at[row, head]]
        vectors = [x.at[row, head] for x in vectors]
        left = DeltaResiduals(kept[0].at[row, :, head], kept[1].at[row, head]) if save_residuals else None
        delta_forward_loop(sizes, tokens, vectors, start.at[row, head], out.at[row, :, head], final.at[row, head], left)

    chosen = jax.ShapeDtypeStruct(v.shape, v.dtype), _chunk_states_shape(b, h, t, width, values)
    return launch_kernel(
        forward,
        out_type=(chosen[0], jax.ShapeDtypeStruct(state.shape, jnp.float32), chosen if save_residuals else ()),
        grid={"row": b, "head": h},
        num_consumer_wgs=sizes.num_consumer_wgs,
        interpret=config.interpret,
    )(*tokens, vectors, state)


def _backward(config, inputs, gates, inverse, transitions, grad, state_grad):
    """The gradients of w V, of the states behind the chunks, and of the first state."""
    n, (q, k) = config.num_splits, inputs[:2]
    tokens = split_rows(q, n), split_rows(k, n), split_rows(grad, n), split_rows_head_major(inverse, n)
    vectors = tuple(split_rows_head_major(x, n) for x in (*(gates or ()), jnp.moveaxis(inputs.erase, 2, 1)))
    walked = functools.partial(_launch_backward, config, tokens, vectors)
    last = backward_split_grads(lambda state: walked(state)[2], transitions, state_grad)
    slope, slopes, first = walked(last)
    return *merge_residuals((slope, slopes), n), first[::n]


def _launch_backward(config, tokens, vectors, state):
    """`descend` for all heads and rows."""
    q, _, grad, _ = tokens
    (b, t, groups, width), (h, values) = q.shape, grad.shape[2:]
    sizes = DeltaKernelConfig(t, width, values, config.scale, config.interpret)

    def backward(q, k, grad, inverse, vectors, end, slope, slopes, first):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = [q.at[row, :, group], k.at[row, :, group], grad.at[row, :, head], inverse.at[row, head]]
        vectors = [x.at[row, head] for x in vectors]
        kept = DeltaResiduals(slope.at[row, :, head], slopes.at[row, head])
        delta_backward_loop(sizes, tokens, vectors, end.at[row, head], first.at[row, head], kept)

    return launch_kernel(
        backward,
        out_type=(
            jax.ShapeDtypeStruct(grad.shape, grad.dtype),
            _chunk_states_shape(b, h, t, width, values),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        num_consumer_wgs=sizes.num_consumer_wgs,
        interpret=config.interpret,
    )(*tokens, vectors, state)


def _chunk_states_shape(b, h, t, width, values):
    return jax.ShapeDtypeStruct((b, h, t // CHUNK, width, values), jnp.bfloat16)
