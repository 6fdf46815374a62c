"""Softmax attention on NVIDIA GPUs by cuDNN, whose kernel skips blocks outside the window."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.dispatch import Unsupported, platform
from recallax.pallas_kernels.window_attention.reference import WindowAttentionArgs

LIBRARY: Literal["cudnn", "xla"] = "cudnn"
"""Implementation of `jax.nn.dot_product_attention`. Tests use "xla", which has the same arguments on any platform."""
MAX_HEAD_DIM = 128
"""Largest head dimension that cuDNN supports on GPUs before Hopper."""


def window_attention(args: WindowAttentionArgs) -> Float[Array, "B T H V"]:
    """Compute attention over whole rows of one document each, in bfloat16 or float16.

    The arguments and the result are those of `window_attention.xla.dense`.

    Raises:
        Unsupported: There is no GPU, or cuDNN does not support the arguments.
    """
    q, k, v, document_ids, window, persistent, cache, _ = args
    if LIBRARY == "cudnn" and platform() != "gpu":
        raise Unsupported(f"cuDNN needs a GPU and this is a {platform().upper()}")
    if document_ids is not None:
        raise Unsupported("segment_ids are given; cuDNN would need a mask of all pairs, which is slow")
    if persistent is not None:
        raise Unsupported("persistent keys are given, which a window cannot express")
    if cache is not None:
        raise Unsupported("a state is given; cuDNN supports whole rows only")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unsupported(f"q is {q.dtype}; cuDNN supports bfloat16 and float16")
    widths = (q.shape[-1], v.shape[-1])
    if widths[0] != widths[1] or widths[0] % 8 or widths[0] > MAX_HEAD_DIM:
        raise Unsupported(
            f"the widths of keys and values are {widths}; cuDNN needs one multiple of 8 up to {MAX_HEAD_DIM} for both"
        )
    local_window = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, local_window_size=local_window, implementation=LIBRARY
    )
