"""Linear attention on Hopper: one pass over time per head, with the state in registers.

A block of threads processes one value head of one row. It iterates over chunks of 64 tokens, which TMA loads ahead of
it, and carries the float32 state in registers; only inputs and outputs pass through global memory. With L the
cumulative log2-decay of a chunk,

    o_i = 2^L_i S^T q_i + sum_{j<=i} 2^(L_i - L_j) (q_i.k_j) v_j        S <- 2^L_C S + sum_j k_j (2^(L_C - L_j) v_j)^T

Documents and padding are encoded in L (`cumulative_decay.py`); without decays and documents there is no L. Operands of
products are bfloat16, sums and the state float32. Decays per channel have kernels of their own
(`linear_channel_decay.py`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import use_interpreter
from recallax.pallas_kernels.linear_attention.mosaic_gpu.backward import linear_attention_bwd
from recallax.pallas_kernels.linear_attention.mosaic_gpu.forward import (
    LinearAttentionInputs,
    linear_attention_fwd,
    linear_attention_primal,
)
from recallax.pallas_kernels.linear_attention.mosaic_gpu.linear_channel_decay import (
    LinearChannelInputs,
    linear_attention_channel_decay,
)
from recallax.pallas_kernels.linear_attention.reference import LinearAttentionArgs
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import bounded_log2_decay, log2_token_decay
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import (
    pad_document_ids,
    pad_tokens,
    require_bfloat16,
    require_head_dims,
)
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import choose_num_splits
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK

_linear_attention = kernel_custom_vjp(linear_attention_primal, linear_attention_fwd, linear_attention_bwd)


def linear_attention(args: LinearAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute linear attention on Hopper.

    The arguments and the result are those of `linear_attention.reference.linear_attention`.

    Raises:
        Unsupported: If a width or a dtype is not supported, or if there is neither a GPU nor `interpret_kernels()`.
    """
    q, k, v, log_decay, state, document_ids, scale = args
    interpret = use_interpreter("gpu")
    (rows, length, heads, v_dim), k_dim = v.shape, q.shape[3]
    require_head_dims(k_dim, v_dim)
    require_bfloat16(q=q, k=k, v=v)
    if state is None:
        state = jnp.zeros((rows, heads, k_dim, v_dim), jnp.float32)
    num_splits = choose_num_splits(rows * heads, -(-length // CHUNK))
    config = LaunchConfig(scale, num_splits, interpret)
    padding = -length % (CHUNK * num_splits)
    document_ids = pad_document_ids(document_ids, padding)
    if log_decay is not None and log_decay.shape[3] > 1:
        decay = pad_tokens(bounded_log2_decay(log_decay), padding)
        decay = decay if document_ids is None else jnp.where(document_ids.valid[..., None, None], decay, 0.0)
        q, k, v = (pad_tokens(x, padding) for x in (q, k, v))
        inputs = LinearChannelInputs(q, k, v, decay, state)
        out, final_state = linear_attention_channel_decay(config, inputs, document_ids)
    else:
        decay = None if log_decay is None else pad_tokens(log2_token_decay(log_decay), padding)
        q, k, v = (pad_tokens(x, padding) for x in (q, k, v))
        out, final_state = _linear_attention(config, LinearAttentionInputs(q, k, v, decay, state), document_ids)
    return out[:, :length], final_state
