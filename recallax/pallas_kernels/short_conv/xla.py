"""Short convolution in XLA: a sum of W shifted products."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import last_valid
from recallax.pallas_kernels.short_conv.reference import ShortConvArgs


def short_conv(args: ShortConvArgs) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
    """Convolve rows; the sum over at most W terms is computed in the inputs' dtype.

    The arguments and the result are those of `short_conv.reference.short_conv`.
    """
    x, weight, state, document_ids = args
    length, past = x.shape[1], weight.shape[0] - 1
    inputs = jnp.concatenate([state, jnp.where(document_ids.valid[..., None], x, 0)], axis=1)
    index = jnp.pad(document_ids.index, ((0, 0), (past, 0)))  # the state belongs to document 0
    out = jnp.zeros_like(x)
    for lag in range(past + 1):
        start = past - lag
        same_document = index[:, start : start + length] == document_ids.index
        out += weight[past - lag][None, None] * jnp.where(
            same_document[..., None], inputs[:, start : start + length], 0
        )
    last = last_valid(document_ids) + past  # index in `inputs`; a row without valid tokens keeps the state
    taps = last[:, None] - past + 1 + jnp.arange(past)[None]
    last_document = jnp.take_along_axis(index, last[:, None], axis=1)
    final = jnp.take_along_axis(inputs, taps[..., None], axis=1)
    return out, jnp.where((jnp.take_along_axis(index, taps, axis=1) == last_document)[..., None], final, 0)
