"""BASED on Hopper: numerators and denominators in one pass, with features computed on the tensor cores.

With a column of ones beside the keys and queries, s' = 1 + q.k is one product, and the kernel of a pair is
f = 1 + s + s^2/2 = (1 + s'^2)/2. Features (`taylor_features.py`) stay in registers: for queries as the left operand of
phi(q) S, for keys, transposed, as that of S + phi(k)^T v. The state has 3 x 64 features, of which the first 153 are
used; it and the sums z of the denominators are carried in float32. `backward.py` has the gradients.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.mosaic_gpu.cumulative_decay import document_gates
from recallax.pallas_kernels.mosaic_gpu.kernel_inputs import pad_document_ids, pad_tokens, require_bfloat16
from recallax.pallas_kernels.mosaic_gpu.kernel_launch import LaunchConfig, kernel_custom_vjp
from recallax.pallas_kernels.mosaic_gpu.sequence_splits import choose_num_splits
from recallax.pallas_kernels.mosaic_gpu.warpgroup_primitives import CHUNK
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.backward import taylor_attention_bwd
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.forward import taylor_attention_fwd, taylor_attention_primal
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_chunk_states import TaylorKernelInputs
from recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_features import (
    HEAD_K_DIM,
    HEAD_V_DIM,
    NUM_PADDED_FEATURES,
    PADDED_HEAD_K_DIM,
    feature_scales,
)
from recallax.pallas_kernels.taylor_attention.reference import TaylorAttentionArgs

_taylor_attention = kernel_custom_vjp(taylor_attention_primal, taylor_attention_fwd, taylor_attention_bwd)


def taylor_attention(args: TaylorAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Compute the numerators and denominators of BASED's attention on Hopper.

    The arguments and the result are those of `taylor_attention.reference.taylor_attention`.

    Raises:
        Unsupported: If the features, a width or a dtype are not supported, or if there is neither a GPU nor
            `interpret_kernels()`.
    """
    q, k, v, state, document_ids, feature_map = args
    interpret = use_interpreter("gpu")
    if feature_map is not feature_maps.taylor:
        raise Unsupported("features is not the symmetric expansion, which it must be")
    for name, size, expected in (("K", q.shape[3], HEAD_K_DIM), ("V", v.shape[3] - 1, HEAD_V_DIM)):
        if size != expected:
            raise Unsupported(f"{name} is {size}; it must be {expected}")
    require_bfloat16(q=q, k=k, v=v)
    (rows, length, heads, _), scales = v.shape, feature_scales()
    num_features = len(scales)
    if state is None:
        state = jnp.zeros((rows, heads, num_features, v.shape[3]), jnp.float32)
    num_splits = choose_num_splits(rows * heads, -(-length // CHUNK))
    padding = -length % (CHUNK * num_splits)
    gates = document_gates(pad_document_ids(document_ids, padding))
    ones = jnp.ones_like(q[..., :1])
    zeros = jnp.zeros((*q.shape[:3], PADDED_HEAD_K_DIM - HEAD_K_DIM - 1), q.dtype)
    # Padding has no ones either, so that all its features are 0.
    q, k = (pad_tokens(jnp.concatenate([x, ones, zeros], axis=3), padding) for x in (q, k))
    scales = scales[None, None, :, None]
    state = jnp.pad(state * scales, ((0, 0), (0, 0), (0, NUM_PADDED_FEATURES - num_features), (0, 0)))
    inputs = TaylorKernelInputs(q, k, pad_tokens(v[..., :-1], padding), state[..., :-1], state[..., -1])
    out, denominator, final_state, final_z = _taylor_attention(LaunchConfig(1.0, num_splits, interpret), inputs, gates)
    final_state = jnp.concatenate([final_state, final_z[..., None]], axis=3)[:, :, :num_features] / scales
    denominator = jnp.moveaxis(denominator, 1, 2)[..., None].astype(v.dtype)
    return jnp.concatenate([out, denominator], axis=3)[:, :length], final_state
