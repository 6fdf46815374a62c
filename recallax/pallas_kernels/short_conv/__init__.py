"""Causal depthwise convolution that respects document boundaries.

    y_t = sum_{l=0}^{W-1} weight[W-1-l] * x_{t-l} (+ bias)

State: the last W - 1 inputs of the document, in the inputs' dtype.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, require
from recallax.pallas_kernels.short_conv import reference, xla
from recallax.pallas_kernels.short_conv.reference import ShortConvArgs

__all__ = ["IMPLEMENTATIONS", "short_conv", "short_conv_step"]

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
    """Convolve whole rows.

    Args:
        x: Inputs.
        weight: Filter of W taps per channel; the last tap is that of the current token.
        bias: Bias per channel; None: 0.
        state: Last W - 1 inputs before the row, which belong to its first document; None: zeros.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output and the last W - 1 inputs, in x's dtype.

    Raises:
        ValueError: Shapes do not match.

    Examples:
        >>> x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
        >>> out, last = short_conv(x, jnp.array([[10.0], [1.0]]))
        >>> out.ravel().tolist(), last.ravel().tolist()
        ([1.0, 12.0, 23.0, 34.0], [4.0])
    """
    op = "short_conv"
    b, t, d = x.shape
    state_shape = (b, weight.shape[0] - 1, d)
    require(op, t >= 1, f"x has {t} tokens; it needs at least 1")
    require(op, weight.shape[1:] == (d,), f"weight has shape {weight.shape}; it must be [W, {d}]")
    state = jnp.zeros(state_shape, x.dtype) if state is None else state
    require(op, state.shape == state_shape, f"state has shape {state.shape}; it must be {state_shape}")
    docs = index_documents(jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids)
    args = ShortConvArgs(x, weight.astype(x.dtype), state, docs)
    out, last = call_implementation(op, IMPLEMENTATIONS, implementation, args)
    return (out if bias is None else out + bias.astype(x.dtype)[None, None]), last


def short_conv_step(
    x: Float[Array, "B D"],
    weight: Float[Array, "W D"],
    state: Float[Array, "B W-1 D"],
    active: Bool[Array, " B"],
    *,
    bias: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
    """Compute one token of `short_conv`.

    Args:
        x: Input of each row.
        weight: Filter of W taps per channel.
        state: Last W - 1 inputs.
        active: Rows that have a token; the others keep their state and output 0.
        bias: Bias per channel; None: 0.

    Returns:
        Output and the last W - 1 inputs, in x's dtype.
    """
    window = jnp.concatenate([state, x[:, None]], axis=1)
    out = jnp.einsum("bwd,wd->bd", window, weight.astype(x.dtype))
    out = out if bias is None else out + bias.astype(x.dtype)[None]
    return jnp.where(active[:, None], out, 0), jnp.where(active[:, None, None], window[:, 1:], state)
