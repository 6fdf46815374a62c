"""Unit lower triangular systems inside kernels for TPUs: the mathematics of `triangular.py` on one matrix.

The diagonal blocks of 16 rows lie side by side along the lanes, [16, C], and are inverted by one substitution for all.
Pairs of blocks are then merged as masked products of whole matrices, in float32 as all else here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.mosaic_tpu import mm, mm_t, t_mm

ROWS = 16


@jax.custom_vjp
def solve(a: Float[Array, "C C"], b: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """(I + a)^{-1} b; entries of `a` on and above the diagonal are not read. C is a multiple of 16."""
    return _forward(a, b)[0]


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _inverse(a)
    x = mm(inverse, b, jnp.float32)
    return x, (inverse, x)


def _backward(residuals: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    """b's slope is y = T^T slope, a's is -y x^T below the diagonal."""
    inverse, x = residuals
    y = t_mm(inverse, slope, jnp.float32)
    row, column = _indices(inverse.shape)
    return jnp.where(row > column, -mm_t(y, x, jnp.float32), 0), y


solve.defvjp(_forward, _backward)


def _indices(shape: tuple[int, ...]) -> tuple[Array, Array]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def _inverse(a: Float[Array, "C C"]) -> Float[Array, "C C"]:
    length = a.shape[0]
    row, column = _indices(a.shape)
    inverse = jnp.where(row // ROWS == column // ROWS, jnp.concatenate([_substitute(a)] * (length // ROWS)), 0)
    size = ROWS
    while size < length:
        # The second half of each block against its first half.
        across = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        corner = mm(jnp.where(across, a, 0), inverse, jnp.float32)
        inverse = inverse - mm(inverse, corner, jnp.float32)
        size *= 2
    return inverse


def _substitute(a: Float[Array, "C C"]) -> Float[Array, "R C"]:
    """The inverses of the diagonal blocks, side by side: column after column is taken off the rows below."""
    length = a.shape[0]
    row, column = _indices((ROWS, length))
    blocks = (jnp.where(column // ROWS == i, a[i * ROWS : (i + 1) * ROWS], 0) for i in range(length // ROWS))
    packed = jnp.where(row > column % ROWS, sum(blocks), 0)
    inverse = jnp.where(row == column % ROWS, 1.0, 0.0).astype(jnp.float32)
    for j in range(ROWS - 1):
        inverse = inverse - _within_blocks(packed, j) * inverse[j : j + 1]
    return inverse


def _along_lanes(x: Float[Array, "R C"], lanes: Int[Array, "R C"]) -> Float[Array, "R C"]:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


@jax.custom_batching.custom_vmap
def _gathered(x: Float[Array, "R C"], lanes: Int[Array, "R C"]) -> Float[Array, "R C"]:
    return _along_lanes(x, lanes)


@_gathered.def_vmap
def _gathered_heads(size: int, batched: list[bool], x: Array, lanes: Array) -> tuple[Array, bool]:
    """All heads' rows in one matrix, since lanes are gathered within matrices only."""
    del batched
    rows = jnp.concatenate([lanes] * size)
    return _along_lanes(x.reshape(-1, x.shape[-1]), rows).reshape(x.shape), True


def _within_blocks(packed: Float[Array, "R C"], j: int) -> Float[Array, "R C"]:
    """Column j of each block in all of the block's columns."""
    _, column = _indices(packed.shape)
    return _gathered(packed, column // ROWS * ROWS + j)
