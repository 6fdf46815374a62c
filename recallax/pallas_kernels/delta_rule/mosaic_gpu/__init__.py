"""The gated delta rule on Hopper: chunk-parallel kernels, and a loop over time that carries the state in registers.

    U = T (w V - b 2^L K S),   T = (I + A)^{-1}

A first kernel inverts the triangular systems of all chunks (`triangular_inverse.py`); a second one loops over time
(`forward.py`). For the gradients that loop also stores U and the state before each chunk. A loop backward in time gives
their gradients, and a last kernel computes the other gradients of each chunk (`backward.py`). Documents and padding are
encoded in the cumulative decays. Operands of products are bfloat16, T and its operands two bfloat16 numbers each, sums
and the state float32. Decays and erase strengths per channel have kernels of their own (`delta_channel_decay.py`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.delta_rule.mosaic_gpu.backward import delta_rule_bwd
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_channel_decay import (
    DeltaChannelInputs,
    delta_rule_channel_decay,
)
from recallax.pallas_kernels.delta_rule.mosaic_gpu.delta_sequence_splits import choose_num_delta_splits
from recallax.pallas_kernels.delta_rule.mosaic_gpu.forward import DeltaRuleInputs, delta_rule_fwd, delta_rule_primal
from recallax.pallas_kernels.delta_rule.reference import DeltaRuleArgs
from recallax.pallas_kernels.dispatch import use_interpreter
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import bounded_log2_decay, log2_token_decay
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import (
    pad_document_ids,
    pad_tokens,
    require_bfloat16,
    require_head_dims,
)
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK

_delta_rule = kernel_custom_vjp(delta_rule_primal, delta_rule_fwd, delta_rule_bwd)


def delta_rule(args: DeltaRuleArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute the gated delta rule on Hopper.

    The arguments and the result are those of `delta_rule.reference.delta_rule`.

    Raises:
        Unsupported: If a width or a dtype is not supported, or if there is neither a GPU nor `interpret_kernels()`.
    """
    q, k, v, erase, write, log_decay, state, document_ids, scale = args
    interpret = use_interpreter("gpu")
    (rows, length, heads, v_dim), k_dim = v.shape, q.shape[3]
    require_head_dims(k_dim, v_dim)
    require_bfloat16(q=q, k=k, v=v)
    num_splits = choose_num_delta_splits(rows * heads, -(-length // CHUNK))
    config = LaunchConfig(scale, num_splits, interpret)
    padding = -length % (CHUNK * num_splits)

    erase, write = erase.astype(jnp.float32), write.astype(jnp.float32)
    valid = True if document_ids is None else document_ids.valid[..., None, None]
    if document_ids is not None:  # padding neither erases nor writes
        erase, write = (jnp.where(valid, x, 0.0) for x in (erase, write))
        document_ids = pad_document_ids(document_ids, padding)
    if max(erase.shape[3], 0 if log_decay is None else log_decay.shape[3]) > 1:
        shape = (rows, length, heads, k_dim)
        if log_decay is None:
            decay = jnp.zeros(shape, jnp.float32)
        else:
            decay = jnp.broadcast_to(bounded_log2_decay(log_decay), shape)
        decay = jnp.where(valid, decay, 0.0)  # nor does padding decay
        erase_k = (jnp.repeat(k, heads // k.shape[2], axis=2).astype(jnp.float32) * erase).astype(k.dtype)
        padded = (pad_tokens(x, padding) for x in (q, k, erase_k, v, write[..., 0], decay))
        out, final_state = delta_rule_channel_decay(config, DeltaChannelInputs._make((*padded, state)), document_ids)
    else:
        decay = None if log_decay is None else pad_tokens(log2_token_decay(log_decay), padding)
        padded = (pad_tokens(x, padding) for x in (q, k, v, erase[..., 0], write[..., 0]))
        out, final_state = _delta_rule(config, DeltaRuleInputs._make((*padded, decay, state)), document_ids)
    return out[:, :length], final_state
