"""Checks and padding that the entry functions of the GPU kernels share."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.dispatch import Unsupported

SUPPORTED_HEAD_DIMS = (64, 128)
"""Widths of keys and of values: one or two column tiles of the tensor cores, for which the registers suffice."""


def require_head_dims(k_dim: int, v_dim: int) -> None:
    """Raise `Unsupported` unless keys and values have a supported width."""
    for name, size in (("K", k_dim), ("V", v_dim)):
        if size not in SUPPORTED_HEAD_DIMS:
            raise Unsupported(f"{name} is {size}; it must be one of {SUPPORTED_HEAD_DIMS}")


def require_bfloat16(**arrays: Any) -> None:
    """Raise `Unsupported` unless all arrays are bfloat16; the keywords name them in the message."""
    for name, x in arrays.items():
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")


def pad_tokens(x: Shaped[Array, "B T ..."], num_padding: int) -> Shaped[Array, "B P ..."]:
    """Append tokens of zeros."""
    return jnp.pad(x, ((0, 0), (0, num_padding)) + ((0, 0),) * (x.ndim - 2))


def pad_document_ids(document_ids: DocumentIds | None, num_padding: int) -> DocumentIds | None:
    """Append padding to the last document of each row."""
    if document_ids is None:
        return None
    index = jnp.pad(document_ids.index, ((0, 0), (0, num_padding)), mode="edge")
    return DocumentIds(index, pad_tokens(document_ids.valid, num_padding))


def sum_shared_heads(grad: Float[Array, "B T H K"], like: Float[Array, "B T G K"]) -> Float[Array, "B T G K"]:
    """Sum gradients per value head over the heads that share a query or key head, in float32.

    Args:
        grad: Gradient per value head.
        like: The queries or keys, whose shape and dtype the result has.
    """
    return jnp.sum(grad.reshape(*like.shape[:3], -1, like.shape[3]), 3, jnp.float32).astype(like.dtype)
