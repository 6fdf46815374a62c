"""Unit lower triangular systems in the TPU kernels: the algorithm of `triangular.py` on one matrix.

The diagonal blocks of 16 rows are packed along the lanes, [16, C], and inverted by one substitution for all blocks.
Pairs of blocks are then merged by masked products of whole matrices. Everything is float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.mosaic_tpu.matmul import dot, dot_nt, dot_tn

BLOCK_ROWS = 16
"""Rows of a block that is inverted by substitution, which takes as many sequential steps."""


@jax.custom_vjp
def solve_unit_lower(a: Float[Array, "C C"], b: Float[Array, "C V"]) -> Float[Array, "C V"]:
    """Return (I + a)^{-1} b.

    Args:
        a: Square matrix, C a multiple of 16; entries on and above the diagonal are ignored.
        b: Right-hand sides.
    """
    return _forward(a, b)[0]


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _unit_lower_inverse(a)
    x = dot(inverse, b, jnp.float32)
    return x, (inverse, x)


def _backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    """With T = (I + a)^{-1}, the gradient of b is y = T^T grad and that of a is -y x^T below the diagonal."""
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
        # Entries of the second half of each block in the columns of its first half.
        across = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        corner = dot(jnp.where(across, a, 0), inverse, jnp.float32)
        inverse = inverse - dot(inverse, corner, jnp.float32)
        size *= 2
    return inverse


def _invert_diagonal_blocks(a: Float[Array, "C C"]) -> Float[Array, "R C"]:
    """Invert the diagonal blocks, packed along the lanes: eliminate the rows below column by column."""
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
    """Batching rule: stack the rows of all heads, because Mosaic gathers lanes of single matrices only."""
    del batched
    rows = jnp.concatenate([lanes] * size)
    return _take_along_lanes(x.reshape(-1, x.shape[-1]), rows).reshape(x.shape), True


def _broadcast_block_column(packed: Float[Array, "R C"], j: int) -> Float[Array, "R C"]:
    """Broadcast column j of each block to all columns of the block."""
    _, column = _indices(packed.shape)
    return _take_lanes(packed, column // BLOCK_ROWS * BLOCK_ROWS + j)
