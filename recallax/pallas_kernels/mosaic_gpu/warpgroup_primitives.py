"""What the Mosaic GPU kernels share: tiles in shared memory, products on the tensor cores, the pipeline, the launch.

The kernels are written for Hopper in lane semantics, where the layout of every register array is explicit: accumulators
have `Layout.WGMMA`, a vector along their rows `WGMMA_ROW`, one along their columns `WGMMA_COL`. One Pallas thread is a
warpgroup of 128 CUDA threads; the last warpgroup of a kernel only issues TMA copies.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = WGMMA.reduce(1)
WGMMA_COL = WGMMA.reduce(0)

CHUNK = 64
"""Tokens that are worked on together: the fewest that the tensor cores take."""


MEMORY_REGISTERS = 40
"""Of the warpgroup that copies; the others share what it gives up."""

INTERPRETER = plgpu.InterpretGPUParams()

type Ref = Any
"""A reference into global or shared memory."""


def smem_transforms(tile: int) -> tuple[Any, ...]:
    """How bfloat16 matrices lie in shared memory, for TMA and the tensor cores alike, in tiles of so many columns.

    Both operands of a product need the same tiles, and a matrix can only be cut between them.
    """
    tiling: Any = plgpu.TilingTransform  # pyright takes the two for abstract
    swizzling: Any = plgpu.SwizzleTransform
    return tiling((8, tile)), swizzling(2 * tile)


def smem_matrix(*shape: int, tile: int) -> Any:
    """Shared memory for bfloat16 matrices."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=smem_transforms(tile))


def zero_accumulator(*shape: int) -> jax.Array:
    """A float32 accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def wgmma_accumulate(*sums: tuple[Any, ...], interpret: bool) -> list[jax.Array]:
    """acc + a @ b + ... for each (acc, (a, b), ...), issued together and awaited once.

    b is a reference into shared memory, a one or an array in registers. The interpreter has no such accumulators.
    """
    if interpret:
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
    """A vector with one entry per row, repeated over the columns."""
    return lax.broadcast_in_dim(x, shape, [0])


def broadcast_per_column(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector with one entry per column, repeated over the rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def row_and_column_iota(shape: tuple[int, ...], zero: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """The row and the column number of each entry of a matrix.

    With an `opaque_zero` of each turn of a loop, masks of them are computed anew rather than kept in registers.
    """
    rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=WGMMA_ROW) + zero
    columns = plgpu.broadcasted_iota(jnp.int32, shape[1:], 0, layout=WGMMA_COL)
    return broadcast_per_row(rows, shape), broadcast_per_column(columns, shape)


def block_index(index: jax.Array, level: jax.Array | int) -> jax.Array:
    """Number of the block of 2^level tokens that a token is in."""
    return lax.shift_right_logical(index, level)


def opaque_zero(step: jax.Array) -> jax.Array:
    """0, which the compiler cannot know.

    Shared memory that is indexed with it is addressed anew in each chunk; else the compiler keeps some fifty addresses
    and descriptors in registers from chunk to chunk, and spills.
    """
    return lax.shift_right_logical(step, 30)


def load_smem_f32(matrix: Ref) -> jax.Array:
    """A matrix from shared memory, in float32."""
    return plgpu.load(matrix, layout=WGMMA).astype(jnp.float32)


def load_vector(x: Ref, layout: Any) -> jax.Array:
    """A vector from global memory."""
    return plgpu.load(x, layout=layout, optimized=False)


def round_to_dtype(x: jax.Array, dtype: Any, interpret: bool) -> jax.Array:
    """x as it is after rounding to a dtype, in float32. The interpreter's compiler would leave the rounding out."""
    return lax.reduce_precision(x, 8, 7) if interpret else x.astype(dtype).astype(jnp.float32)


def scale_rows(matrix: Ref, factor: jax.Array, *, interpret: bool, scale: float = 1.0) -> jax.Array:
    """A matrix from shared memory with its rows scaled, rounded to its dtype, in float32."""
    return round_to_dtype(
        load_smem_f32(matrix) * broadcast_per_row(factor * scale, matrix.shape), matrix.dtype, interpret
    )


def store_through_smem(*copies: tuple[Ref, jax.Array, Ref]) -> None:
    """Send arrays to global memory, each through its own shared memory, once the last call's copies have left it."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for staged, value, _ in copies:
        staged[...] = value
    plgpu.commit_smem()
    copy_smem_to_gmem(*((staged, target) for staged, _, target in copies))


def copy_smem_to_gmem(*copies: tuple[Ref, Ref]) -> None:
    """Copy shared memory that was committed to global memory, as one group."""
    for staged, target in copies:
        plgpu.copy_smem_to_gmem(staged, target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def hi_lo_split(x: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """x as a sum of two bfloat16 arrays: rounded, and what is lost by that."""
    high = round_to_dtype(x, jnp.bfloat16, interpret)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def hi_lo_products(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[tuple[Any, Any], ...]:
    """The products for `wgmma_accumulate` whose sum is that of two matrices, both in `hi_lo_split`, to some 16 binary digits."""
    return (a[0], b[0]), (a[0], b[1]), (a[1], b[0])


def chunk_pipeline(
    body: Callable[..., Any],
    tokens: Sequence[Ref],
    gates: Sequence[Ref],
    compute_context: Callable[[Callable[[Any], Any]], None],
    num_consumer_wgs: int,
    tile: int | None,
    num_prefetch: int,
    chunk_order: Callable[[Any], Any],
) -> None:
    """Call body((step,), *blocks, carry) -> carry for each chunk in `chunk_order`, while TMA brings in that many more.

    tokens: references [T, width], in tiles of so many columns, None: of their widths; gates: references of so many
    entries per chunk. `compute_context` is given the walk as a function of the first carry.
    """
    count = tokens[0].shape[0] // CHUNK

    def index(step):
        return (chunk_order(step), 0)

    blocks = [
        plgpu.BlockSpec((CHUNK, x.shape[1]), index, transforms=smem_transforms(tile or x.shape[1])) for x in tokens
    ]
    vectors = [plgpu.BlockSpec((x.shape[0] // count,), lambda step: (chunk_order(step),)) for x in gates]
    plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(count,),
        in_specs=[*blocks, *vectors],
        max_concurrent_steps=num_prefetch + 1,
        num_compute_wgs=num_consumer_wgs,
        wg_axis="worker",
        memory_registers=MEMORY_REGISTERS,
        compute_context=compute_context,
    )(*tokens, *gates)


def launch_kernel(
    body: Callable[..., None],
    *,
    name: str | None = None,
    out_type: Any,
    grid: dict[str, int],
    num_consumer_wgs: int,
    interpret: bool,
    num_producer_wgs: int = 1,
    column_sums: bool = False,
) -> Callable[..., Any]:
    """The kernel with that many computing warpgroups and one that copies, on axis "worker"; or one that does both.

    name: the body's own if None. Sums along rows lie within a warp; those along columns need shared memory.
    """
    body.__name__ = name or body.__name__
    threads = num_consumer_wgs + num_producer_wgs
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads if threads > 1 else None,
        thread_name="worker" if threads > 1 else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=2048 if column_sums else 0,
        ),
        interpret=INTERPRETER if interpret else None,
    )
