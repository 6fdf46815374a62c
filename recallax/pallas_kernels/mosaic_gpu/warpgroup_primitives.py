"""Operations of one warpgroup: register layouts, matrices in shared memory, products on the tensor cores, copies.

Register arrays have explicit layouts: accumulators have `Layout.WGMMA`, a vector with one entry per row `WGMMA_ROW`,
and a vector with one entry per column `WGMMA_COL`. Pallas' interpreter has neither accumulators nor bfloat16 rounding
inside a kernel, so the functions that need them have a second path for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from recallax.pallas_kernels.dispatch import interpreting

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = WGMMA.reduce(1)
WGMMA_COL = WGMMA.reduce(0)

CHUNK = 64
"""Tokens of a chunk: the fewest rows of a tensor-core product."""
CHUNK_SHAPE = (CHUNK, CHUNK)
"""Shape of a matrix of pairs of tokens of one chunk."""

BFLOAT16_EXPONENT_BITS, BFLOAT16_MANTISSA_BITS = 8, 7

OPAQUE_ZERO_SHIFT = 30
"""Step numbers are below 2^30, so a shift by 30 bits makes them 0."""

type Ref = Any
"""A reference into global or shared memory."""


def smem_transforms(tile: int) -> tuple[Any, ...]:
    """Return the layout of bfloat16 matrices in shared memory that both TMA and the tensor cores read.

    Args:
        tile: Columns of a tile. Both operands of a product need the same tiles, and a matrix can only be sliced between
            them.
    """
    tiling: Any = plgpu.TilingTransform  # pyright takes the two for abstract
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, tile)), swizzling(2 * tile)


def smem_matrix(*shape: int, tile: int) -> Any:
    """Return the scratch type of bfloat16 matrices in shared memory, with `tile` columns per tile."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=smem_transforms(tile))


def zero_accumulator(*shape: int) -> jax.Array:
    """Return zeros in float32 with the layout of an accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def wgmma_accumulate(*sums: tuple[Any, ...]) -> list[jax.Array]:
    """Compute `acc + a @ b + ...` for each `(acc, (a, b), ...)`: all products are issued together and awaited once.

    Args:
        *sums: An accumulator and pairs of operands. `b` is a reference into shared memory, `a` a reference or a
            register array, both bfloat16.

    Returns:
        The accumulators, float32.
    """
    if interpreting():
        return [sum((jnp.dot(_as_float32(a), _as_float32(b)) for a, b in pairs), start=acc) for acc, *pairs in sums]

    def issue(accumulators):
        for accumulator, (_, *pairs) in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

    accumulators: Any = [plgpu.ACC.init(acc) for acc, *_ in sums]  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_state(issue)(accumulators)


def _as_float32(x: Any) -> jax.Array:
    return x[...].astype(jnp.float32)


def broadcast_per_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a vector with one entry per row over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def broadcast_per_column(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a vector with one entry per column over the rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def row_and_column_iota(shape: tuple[int, ...], row_offset: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """Return the row index and the column index of each entry of a matrix.

    Args:
        shape: Shape of the matrix.
        row_offset: Added to the row indices. With an `opaque_zero` of the current step of a loop, the compiler computes
            masks of the indices again in each step and does not keep them in registers.
    """
    rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=WGMMA_ROW) + row_offset
    columns = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=WGMMA_COL)
    return broadcast_per_row(rows, shape), broadcast_per_column(columns, shape)


def block_index(index: jax.Array, level: jax.Array | int) -> jax.Array:
    """Return the index of the block of 2^level tokens that contains a token."""
    return lax.shift_right_logical(index, level)


def shared_group(head: jax.Array, num_heads: int, num_groups: int) -> jax.Array:
    """Return the group of queries and keys that a value head reads: consecutive heads share a group."""
    return lax.div(head, jnp.int32(num_heads // num_groups))


def opaque_zero(step: jax.Array) -> jax.Array:
    """Return 0 in a form that the compiler cannot simplify.

    Shared memory that is indexed with it is addressed again in each chunk. Otherwise the compiler keeps some fifty
    addresses and descriptors in registers from chunk to chunk, and spills.
    """
    return lax.shift_right_logical(step, OPAQUE_ZERO_SHIFT)


def load_smem_f32(matrix: Ref) -> jax.Array:
    """Load a matrix from shared memory in float32."""
    return plgpu.load(matrix, layout=WGMMA).astype(jnp.float32)


def load_vector(x: Ref, layout: Any) -> jax.Array:
    """Load an array from global memory in the given layout."""
    return plgpu.load(x, layout=layout, optimized=False)


def round_to_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """Round to a dtype and return float32. The compiler of the interpreter would drop a pair of casts."""
    if interpreting():
        return lax.reduce_precision(x, BFLOAT16_EXPONENT_BITS, BFLOAT16_MANTISSA_BITS)
    return x.astype(dtype).astype(jnp.float32)


def scale_rows(matrix: Ref, factor: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """Load a matrix from shared memory, scale its rows, round to its dtype, and return float32.

    Args:
        matrix: Reference [rows, columns].
        factor: One factor per row.
        scale: Factor of all rows.
    """
    return round_to_dtype(load_smem_f32(matrix) * broadcast_per_row(factor * scale, matrix.shape), matrix.dtype)


def pair_decay(query_decay: jax.Array, key_decay: Ref, mask: jax.Array) -> jax.Array:
    """Return the decay 2^(L_i - L_j) of each pair of a query i (row) and a key j (column) of a chunk.

    Args:
        query_decay: Cumulative log2-decay of the queries, with the layout `WGMMA_ROW`.
        key_decay: Reference to the cumulative log2-decay of the keys.
        mask: Pairs that see each other; the others get 0.
    """
    log2_decay = broadcast_per_row(query_decay, CHUNK_SHAPE)
    log2_decay = log2_decay - broadcast_per_column(plgpu.load(key_decay, layout=WGMMA_COL), CHUNK_SHAPE)
    return jnp.exp2(jnp.where(mask, log2_decay, -jnp.inf))


def store_through_smem(*copies: tuple[Ref, jax.Array, Ref]) -> None:
    """Store `(staging, value, target)` to global memory through shared memory.

    It first waits until the copies of the previous call have left shared memory.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for staging, value, _ in copies:
        staging[...] = value
    plgpu.commit_smem()
    copy_smem_to_gmem(*((staging, target) for staging, _, target in copies))


def copy_smem_to_gmem(*copies: tuple[Ref, Ref]) -> None:
    """Start copies `(source, target)` from committed shared memory to global memory, as one group."""
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def hi_lo_split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split float32 into two bfloat16 arrays: the rounded value and the rounding error."""
    high = round_to_dtype(x, jnp.bfloat16)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def hi_lo_products(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[tuple[Any, Any], ...]:
    """Return the operand pairs whose sum is the product of two matrices in `hi_lo_split`, to about 16 bits.

    The product of both rounding errors is below that accuracy and is left out.
    """
    return (a[0], b[0]), (a[0], b[1]), (a[1], b[0])
