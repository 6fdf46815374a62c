"""Unit lower triangular systems inside kernels for TPUs: the mathematics of `triangular.py` on one matrix.

The diagonal blocks of 16 rows lie side by side along the lanes, [16, C], and are inverted by one substitution for all.
Pairs of blocks are then merged as masked products of whole matrices, in float32 as all else here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.mosaic_tpu.chunk_scan import dot, dot_nt, dot_tn

BLOCK_ROWS = 16


@jax.custom_vjp
def solve_unit_lower(a: Float[Array, "C C"], b: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """(I + a)^{-1} b; entries of `a` on and above the diagonal are not read. C is a multiple of 16."""
    return _forward(a, b)[0]


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _unit_lower_inverse(a)
    x = dot(inverse, b, jnp.float32)
    return x, (inverse, x)


def _backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    """b's slope is y = T^T slope, a's is -y x^T below the diagonal."""
    inverse, x = residuals
    y = dot_tn(inverse, grad, jnp.float32)
    row, column = _indices(inverse.shape)
    return jnp.where(row > column, -dot_nt(y, x, jnp.float32), 0), y


solve_unit_lower.defvjp(_forward, _backward)


def _indices(shape: tuple[int, ...]) -> tuple[Array, Array]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def _unit_lower_inverse(a: Float[Array, "C C"]) -> Float[Array, "C C"]:
    length = a.shape[0]
    row, column = _indices(a.shape)
    inverse = jnp.where(
        row // BLOCK_ROWS == column // BLOCK_ROWS,
        jnp.concatenate([_invert_diagonal_blocks(a)] * (length // BLOCK_ROWS)),
        0,
    )
    size = BLOCK_ROWS
    while size < length:
        # The second half of each block against its first half.
        across = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        corner = dot(jnp.where(across, a, 0), inverse, jnp.float32)
        inverse = inverse - dot(inverse, corner, jnp.float32)
        size *= 2
    return inverse


def _invert_diagonal_blocks(a: Float[Array, "C C"]) -> Float[Array, "R C"]:
    """The inverses of the diagonal blocks, side by side: column after column is taken off the rows below."""
    length = a.shape[0]
    row, column = _indices((BLOCK_ROWS, length))
    blocks = (
        jnp.where(column // BLOCK_ROWS == i, a[i * BLOCK_ROWS : (i + 1) * BLOCK_ROWS], 0)
        for i in range(length // BLOCK_ROWS)
    )
    packed = jnp.where(row > column % BLOCK_ROWS, sum(blocks), 0)
    inverse = jnp.where(row == column % BLOCK_ROWS, 1.0, 0.0).astype(jnp.float32)
    for j in range(BLOCK_ROWS - 1):
        inverse = inverse - _broadcast_block_column(packed, j) * inverse[j : j + 1]
    return inverse


def _take_along_lanes(x: Float[Array, "R C"], lanes: Int[Array, "R C"]) -> Float[Array, "R C"]:
    return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


@jax.custom_batching.custom_vmap
def _take_lanes(x: Float[Array, "R C"], lanes: Int[Array, "R C"]) -> Float[Array, "R C"]:
    return _take_along_lanes(x, lanes)


@_take_lanes.def_vmap
def _take_lanes_batched(size: int, batched: list[bool], x: Array, lanes: Array) -> tuple[Array, bool]:
    """All heads' rows in one matrix, since lanes are gathered within matrices only."""
    del batched
    rows = jnp.concatenate([lanes] * size)
    return _take_along_lanes(x.reshape(-1, x.shape[-1]), rows).reshape(x.shape), True


def _broadcast_block_column(packed: Float[Array, "R C"], j: int) -> Float[Array, "R C"]:
    """Column j of each block in all of the block's columns."""
    _, column = _indices(packed.shape)
    return _take_lanes(packed, column // BLOCK_ROWS * BLOCK_ROWS + j)
