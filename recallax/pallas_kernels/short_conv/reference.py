"""Definition of the short convolution: a scan over tokens with a window of the last inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds


class ShortConvArgs(NamedTuple):
    """Checked arguments of an implementation of `short_conv`."""

    x: Float[Array, "B T D"]
    weight: Float[Array, "W D"]
    state: Float[Array, "B P D"]
    """The last P = W - 1 inputs before the row."""
    document_ids: DocumentIds


def short_conv(args: ShortConvArgs) -> tuple[Float[Array, "B T D"], Float[Array, "B P D"]]:
    """y_t = sum_l weight[W-1-l] x_{t-l}; inputs of earlier documents and of padding are 0."""
    x, weight, state, document_ids = args

    def step(carry, token):
        past, document = carry
        x, index, valid = token
        past = jnp.where((index == document)[:, None, None], past, 0)
        window = jnp.concatenate([past, jnp.where(valid[:, None], x, 0)[:, None]], axis=1)
        past = jnp.where(valid[:, None, None], window[:, 1:], past)
        return (past, index), jnp.einsum("bwd,wd->bd", window, weight)

    tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (x, *document_ids))
    (past, _), out = jax.lax.scan(step, (state, jnp.zeros_like(document_ids.index[:, 0])), tokens)
    return jnp.moveaxis(out, 0, 1), past
