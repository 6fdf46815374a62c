"""A gather along time whose transpose is a gather as well."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@jax.custom_vjp
def gather_with_inverse(
    x: Shaped[Array, "B N ..."], indices: Int[Array, "B M"], inverse_indices: Int[Array, "B N"]
) -> Shaped[Array, "B M ..."]:
    """Gather entries along axis 1: y[b, m] = x[b, indices[b, m]], or 0 where the index is N.

    The inverse indices make the gradient a gather too. Autodiff would emit a scatter, which adds rows one by one.

    Args:
        x: Entries; each is gathered at most once.
        indices: Index of the entry of x for each output; N gives 0.
        inverse_indices: Index of the output that holds each entry of x; M if none does.

    Returns:
        The gathered entries.
    """
    clipped = jnp.minimum(indices, x.shape[1] - 1)
    trailing_axes = [1] * (x.ndim - 2)
    gathered = jnp.take_along_axis(x, clipped.reshape(*clipped.shape, *trailing_axes), axis=1)
    in_range = (indices < x.shape[1]).reshape(*clipped.shape, *trailing_axes)
    return jnp.where(in_range, gathered, jnp.zeros((), x.dtype))


def _forward(x: Array, indices: Array, inverse_indices: Array) -> tuple[Array, tuple[Array, Array]]:
    return gather_with_inverse(x, indices, inverse_indices), (indices, inverse_indices)


def _backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    indices, inverse_indices = residuals
    return gather_with_inverse(grad, inverse_indices, indices), None, None


_defvjp: Callable[..., Any] = gather_with_inverse.defvjp
_defvjp(_forward, _backward)
