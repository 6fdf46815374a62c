"""Causal depthwise convolution of a few taps, aware of documents.

    y_t = sum_{l=0}^{W-1} weight[W-1-l] * x_{t-l} (+ bias)

State: the last W - 1 inputs of the document, in the inputs' dtype.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, require
from recallax.pallas_kernels.short_conv import reference, xla

IMPLEMENTATIONS = {"reference": reference.short_conv, "xla": xla.short_conv}


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    *,
    bias: Float[Array, " D"] | None = None,
    state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Output and the last W - 1 inputs, in x's dtype.

    state: belongs to the row's first document; None starts at zero. segments: document ids, 0 is padding.
    Raises ValueError where shapes disagree.
    """
    op = "short_conv"
    b, t, d = x.shape
    wanted = (b, weight.shape[0] - 1, d)
    require(op, t >= 1, f"x has {t} tokens; it needs at least 1")
    require(op, weight.shape[1:] == (d,), f"weight has shape {weight.shape}; it must be [W, {d}]")
    state = jnp.zeros(wanted, x.dtype) if state is None else state
    require(op, state.shape == wanted, f"state has shape {state.shape}; it must be {wanted}")
    docs = index_documents(jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids)
    out, last = call_implementation(op, IMPLEMENTATIONS, implementation, x, weight.astype(x.dtype), state, docs)
    return (out if bias is None else out + bias.astype(x.dtype)[None, None]), last


def short_conv_step(
    x: Float[Array, "B D"],
    weight: Float[Array, "W D"],
    state: Float[Array, "B W-1 D"],
    active: Bool[Array, " B"],
    *,
    bias: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
    """One token; inactive rows keep their state and output 0."""
    window = jnp.concatenate([state, x[:, None]], axis=1)
    out = jnp.einsum("bwd,wd->bd", window, weight.astype(x.dtype))
    out = out if bias is None else out + bias.astype(x.dtype)[None]
    return jnp.where(active[:, None], out, 0), jnp.where(active[:, None, None], window[:, 1:], state)
