"""Inverse of unit lower triangular matrices, for the chunked delta rule.

    T = (I + A)^{-1},  A strictly lower triangular

Diagonal blocks of 16 rows are inverted by forward substitution and then merged in pairs:
[[P, 0], [L, Q]]^{-1} = [[P^{-1}, 0], [-Q^{-1} L P^{-1}, Q^{-1}]], all in float32. Products of powers of A (Neumann
doubling) need fewer steps but are inaccurate: for keys with a correlation of 0.9 their float32 error exceeds 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.einsum_f32 import einsum_f32

DIAGONAL_BLOCK_ROWS = 16
"""Rows of a block that is inverted by forward substitution; larger blocks take more sequential steps."""


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Return (I + a)^{-1} in float32.

    Args:
        a: Square matrices; entries on and above the diagonal are ignored.
    """
    length = a.shape[-1]
    whole = DIAGONAL_BLOCK_ROWS
    while whole < length:
        whole *= 2
    batch = a.shape[:-2]
    a = jnp.pad(jnp.tril(a, -1), [(0, 0)] * len(batch) + [(0, whole - length)] * 2).reshape(-1, whole, whole)
    inverse, size = _forward_substitution(_diagonal_blocks(a, DIAGONAL_BLOCK_ROWS)), DIAGONAL_BLOCK_ROWS
    while size < whole:
        first, second = (inverse.reshape(a.shape[0], -1, 2, size, size)[:, :, half] for half in (0, 1))
        across = _diagonal_blocks(a, 2 * size)[..., size:, :size]
        corner = -einsum_f32("bnij,bnjk->bnik", einsum_f32("bnij,bnjk->bnik", second, across), first)
        upper = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[:, 0, :length, :length].reshape(*batch, length, length)


def _diagonal_blocks(a: Float[Array, "N C C"], size: int) -> Float[Array, "N M S S"]:
    """Return the blocks of `size` rows along the diagonal."""
    count = a.shape[-1] // size
    blocks = a.reshape(-1, count, size, count, size)
    return jnp.stack([blocks[:, i, :, i] for i in range(count)], axis=1)


def _forward_substitution(a: Float[Array, "N M R R"]) -> Float[Array, "N M R R"]:
    """Invert I + a row by row: row i of the inverse is e_i minus row i of `a` times the rows above."""
    size = a.shape[-1]

    def row(i: Array, inverse: Array) -> Array:
        factors = jax.lax.dynamic_index_in_dim(a, i, axis=-2, keepdims=False)
        new = jax.nn.one_hot(i, size, dtype=a.dtype)[None, None] - jnp.sum(factors[..., None] * inverse, axis=-2)
        return jax.lax.dynamic_update_index_in_dim(inverse, new, i, axis=-2)

    start = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    return jax.lax.fori_loop(1, size, row, start)


def _forward(a: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(a)
    return inverse, inverse


def _backward(inverse: Array, grad: Array) -> tuple[Array]:
    """With d(I + A)^{-1} = -T dA T, the gradient of A is -T^T grad T^T below the diagonal."""
    left = einsum_f32("...ji,...jk->...ik", inverse, grad)
    return (jnp.tril(-einsum_f32("...ij,...kj->...ik", left, inverse), -1),)


unit_lower_inverse.defvjp(_forward, _backward)
