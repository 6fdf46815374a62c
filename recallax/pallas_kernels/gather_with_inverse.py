"""Rows moved to other places, and back in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@jax.custom_vjp
def gather_with_inverse(
    x: Shaped[Array, "B N ..."], indices: Int[Array, "B M"], inverse_indices: Int[Array, "B N"]
) -> Shaped[Array, "B M ..."]:
    """y[b, m] = x[b, source[b, m]], or 0 where source is N; each row of x goes to one place at most.

    target is the inverse: where x[b, n] went, or M if nowhere. It makes the transpose a gather too, where autodiff's
    scatter would add rows one by one.
    """
    at = jnp.minimum(indices, x.shape[1] - 1)
    rank = [1] * (x.ndim - 2)
    taken = jnp.take_along_axis(x, at.reshape(*at.shape, *rank), axis=1)
    return jnp.where((indices < x.shape[1]).reshape(*at.shape, *rank), taken, jnp.zeros((), x.dtype))


def _forward(x: Array, indices: Array, inverse_indices: Array) -> tuple[Array, tuple[Array, Array]]:
    return gather_with_inverse(x, indices, inverse_indices), (indices, inverse_indices)


def _backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    source, target = residuals
    return gather_with_inverse(grad, target, source), None, None


_defvjp: Callable[..., Any] = gather_with_inverse.defvjp
_defvjp(_forward, _backward)
