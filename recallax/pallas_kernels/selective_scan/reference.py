"""Definition of the element-wise gated recurrence: a scan over tokens, in float32 or wider."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, single_document


class SelectiveScanArgs(NamedTuple):
    """Checked arguments of an implementation of `selective_scan`."""

    x: Float[Array, "B T D"]
    rate: Float[Array, "B T D"]
    a: Float[Array, "D N"]
    b: Float[Array, "B T N"]
    c: Float[Array, "B T N"]
    state: Float[Array, "B D N"]
    document_ids: DocumentIds | None
    """None: one document per row."""


def selective_scan(args: SelectiveScanArgs) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """h_t = exp(r_t A) h_{t-1} + x_t B_t^T,  y_t = h_t C_t; h is 0 where a document starts and unchanged at padding."""
    x, rate, a, b, c, state, document_ids = args
    dtype = accumulator_dtype(x.dtype)
    document_ids = single_document(*x.shape[:2]) if document_ids is None else document_ids

    def step(carry, token):
        state, document = carry
        x, rate, b, c, index, valid = token
        previous = jnp.where((index == document)[:, None, None], state, 0)
        updated = jnp.exp(rate[..., None] * a.astype(dtype)[None]) * previous + x[..., None] * b[:, None]
        state = jnp.where(valid[:, None, None], updated, previous)
        return (state, index), jnp.einsum("bdn,bn->bd", state, c)

    tokens = tuple(jnp.moveaxis(part.astype(dtype), 1, 0) for part in (x, rate, b, c))
    tokens += tuple(jnp.moveaxis(part, 1, 0) for part in document_ids)
    carry = (state.astype(dtype), jnp.zeros_like(document_ids.index[:, 0]))
    (state, _), out = jax.lax.scan(step, carry, tokens)
    return jnp.moveaxis(out, 0, 1).astype(x.dtype), state
