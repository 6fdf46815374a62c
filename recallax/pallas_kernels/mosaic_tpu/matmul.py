"""Matrix products inside TPU kernels: operands rounded to a dtype, float32 sums, also in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(a: Float[Array, "I J"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """Product a b of float32 matrices; operands are rounded to `dtype`, also in the backward pass."""
    return _dot_general(a, b, 1, 0, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_nt(a: Float[Array, "I J"], b: Float[Array, "K J"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """Product a b^T, rounded as in `dot`."""
    return _dot_general(a, b, 1, 1, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_tn(a: Float[Array, "J I"], b: Float[Array, "J K"], dtype: DTypeLike) -> Float[Array, "I K"]:
    """Product a^T b, rounded as in `dot`."""
    return _dot_general(a, b, 0, 0, dtype)


def _dot_general(a: Array, b: Array, i: int, j: int, dtype: DTypeLike) -> Array:
    """Contract axis i of a with axis j of b. The batching rule keeps heads in front, also for an unbatched operand."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    multiply = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    @jax.custom_batching.custom_vmap
    def product(a: Array, b: Array) -> Array:
        return multiply(a, b, (((i,), (j,)), ((), ())))

    @product.def_vmap
    def _(size: int, batched: list[bool], a: Array, b: Array) -> tuple[Array, bool]:
        a, b = (
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip((a, b), batched, strict=True)
        )
        return multiply(a, b, (((i + 1,), (j + 1,)), ((0,), (0,)))), True

    return product(a.astype(dtype), b.astype(dtype))


def _define_vjp(product: Any, left: Callable[..., Array], right: Callable[..., Array]) -> None:
    """Register a product's vector-Jacobian product.

    Args:
        product: The product, a `jax.custom_vjp`.
        left: Gradient of the first operand, from both operands, the product's gradient and the dtype.
        right: Gradient of the second operand, from the same arguments.
    """
    product.defvjp(
        lambda a, b, dtype: (product(a, b, dtype), (a, b)),
        lambda dtype, operands, grad: (left(*operands, grad, dtype), right(*operands, grad, dtype)),
    )


_define_vjp(dot, lambda a, b, s, to: _dot_general(s, b, 1, 1, to), lambda a, b, s, to: _dot_general(a, s, 0, 0, to))
_define_vjp(dot_nt, lambda a, b, s, to: _dot_general(s, b, 1, 0, to), lambda a, b, s, to: _dot_general(s, a, 0, 0, to))
_define_vjp(dot_tn, lambda a, b, s, to: _dot_general(b, s, 1, 1, to), lambda a, b, s, to: _dot_general(a, s, 1, 0, to))
