"""Rows moved to other places, and back in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@jax.custom_vjp
def moved(
    x: Shaped[Array, "B N ..."], source: Int[Array, "B M"], target: Int[Array, "B N"]
) -> Shaped[Array, "B M ..."]:
    """y[b, m] = x[b, source[b, m]], or 0 where source is N; each row of x goes to one place at most.

    target is the inverse: where x[b, n] went, or M if nowhere. It makes the transpose a gather too, where autodiff's
    scatter would add rows one by one.
    """
    at = jnp.minimum(source, x.shape[1] - 1)
    rank = [1] * (x.ndim - 2)
    taken = jnp.take_along_axis(x, at.reshape(*at.shape, *rank), axis=1)
    return jnp.where((source < x.shape[1]).reshape(*at.shape, *rank), taken, jnp.zeros((), x.dtype))


def _forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return moved(x, source, target), (source, target)


def _backward(maps: tuple[Array, Array], slope: Array) -> tuple[Array, None, None]:
    source, target = maps
    return moved(slope, target, source), None, None


_differentiable: Callable[..., Any] = moved.defvjp
_differentiable(_forward, _backward)
