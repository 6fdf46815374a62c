"""Landmark attention on TPUs: one pass over the blocks with a running softmax, and a backward pass in three kernels.

A past block enters the softmax as one logit, that of its landmark, whose value is the average within the block. A
program computes a tile of queries of one head. Past blocks come in groups along the last axis of the grid; groups that
start after the tile are skipped. The queries' own block lies in the tile's keys and those of the previous tile.

Backward (D = do.o, o_b = sum_j r_bj v_j; p is computed from the saved log-sum-exp and r is recomputed):

    own tokens dS = p_j (do.v_j - D);   landmarks dS = p_b (do.o_b - D);   past tokens dS = p_b r_bj (do.v_j - do.o_b)

dq uses the order of the forward pass. dk and dv of past blocks have the queries as the last axis. dk and dv of the own
blocks take one program per tile of keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.dispatch import Unsupported, interpreting, require_platform
from recallax.pallas_kernels.landmark_attention.landmark_blocks import complete_blocks
from recallax.pallas_kernels.landmark_attention.landmark_tpu_kernels import (
    TILE,
    LandmarkTPUGrid,
    dq_kernel,
    forward_kernel,
    local_dkv_kernel,
    past_dkv_kernel,
)
from recallax.pallas_kernels.landmark_attention.reference import LandmarkAttentionArgs
from recallax.pallas_kernels.landmark_attention.xla import documents_or_single
from recallax.pallas_kernels.mosaic_tpu.chunk_grid import require_uniform_dtype, sum_per_group
from recallax.pallas_kernels.mosaic_tpu.chunk_operands import output_shape
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import INTERPRET_PARAMS

KEYS_PER_GROUP = 512
"""Approximate number of keys in a group of past blocks."""
SUBLANES = 8
"""Sublanes of a float32 register."""


class LandmarkTPUIndices(NamedTuple):
    """Times and documents of tokens and blocks: along lanes for queries, along sublanes for keys."""

    group_start_time: Int[Array, "B N"]
    """Time of the first landmark of each group of blocks."""
    block_start_q: Int[Array, "B 1 P"]
    """Time at which the query's own block starts."""
    document_q: Int[Array, "B 1 P"]
    block_start_k: Int[Array, "B P 1"]
    """Time at which the key's own block starts; below every query's at landmarks and padding."""
    document_block: Int[Array, "B M 1"]
    landmark_time: Int[Array, "B M 1"]
    """Time of the block's landmark; the row's length if there is no block."""


class _LandmarkOperands(NamedTuple):
    """Head-major arrays, padded to whole tiles and groups; S = M * padded_block_size."""

    q: Float[Array, "B H P K"]
    k: Float[Array, "B G P K"]
    v: Float[Array, "B G P V"]
    landmark_k: Float[Array, "B G M K"]
    block_k: Float[Array, "B G S K"]
    block_v: Float[Array, "B G S V"]
    indices: LandmarkTPUIndices


def landmark_attention(args: LandmarkAttentionArgs) -> Float[Array, "B T H V"]:
    """Compute landmark attention over whole rows on a TPU.

    The arguments and the result are those of `landmark_attention.xla.dense`.

    Raises:
        Unsupported: A cache is given, the block is longer than a tile, the dtypes differ or there is no TPU.
    """
    q, k, v, segment_ids, positions, block_size, cache = args
    require_platform("tpu")
    if cache is not None:
        raise Unsupported("a cache is given; the kernel supports whole rows only")
    if block_size > TILE:
        raise Unsupported(f"block_size is {block_size}; the kernel supports at most {TILE}")
    require_uniform_dtype(q=q, k=k, v=v)
    rows, length, heads, _ = q.shape
    docs = documents_or_single(segment_ids, positions)
    blocks = complete_blocks(k, v, docs, positions, block_size, None)
    padded_block_size = -(-block_size // SUBLANES) * SUBLANES
    count = blocks.landmark_time.shape[1]
    per_group = -(-min(count, max(1, KEYS_PER_GROUP // padded_block_size)) // SUBLANES) * SUBLANES
    tiles, groups = -(-length // TILE), -(-count // per_group)
    sizes = LandmarkTPUGrid(rows, heads, heads // k.shape[2], tiles, block_size, padded_block_size, per_group, groups)

    extra_tokens, extra_blocks = tiles * TILE - length, groups * per_group - count
    offset, time = positions % (block_size + 1), jnp.arange(length)[None]
    block_start = jnp.where(docs.valid & (offset < block_size), time - offset, -block_size - 1)
    pad_time, pad_blocks = ((0, 0), (0, extra_tokens)), ((0, 0), (0, extra_blocks))
    landmark_time = jnp.pad(blocks.landmark_time, pad_blocks, constant_values=length)
    indices = LandmarkTPUIndices(
        landmark_time.reshape(rows, groups, per_group).min(axis=2),
        jnp.pad(time - offset, pad_time, constant_values=-2 * block_size - 2)[:, None],
        jnp.pad(docs.index, pad_time, constant_values=-1)[:, None],
        jnp.pad(block_start, pad_time, constant_values=-block_size - 1)[..., None],
        jnp.pad(blocks.document_index, pad_blocks)[..., None],
        landmark_time[..., None],
    )
    q, k, v = (jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, extra_tokens), (0, 0))) for x in (q, k, v))
    landmark_k = jnp.pad(jnp.moveaxis(blocks.landmark_k, 1, 2), ((0, 0), (0, 0), (0, extra_blocks), (0, 0)))

    def flatten(x: Float[Array, "B M L G W"]) -> Float[Array, "B G S W"]:
        x = jnp.pad(x, ((0, 0), (0, extra_blocks), (0, padded_block_size - block_size), (0, 0), (0, 0)))
        return jnp.moveaxis(x, 3, 1).reshape(rows, x.shape[3], -1, x.shape[-1])

    operands = _LandmarkOperands(q, k, v, landmark_k, flatten(blocks.k), flatten(blocks.v), indices)
    return jnp.moveaxis(_attend(operands, sizes), 2, 1)[:, :length]


class _LandmarkBlockSpecs:
    """Block specifications of a grid (row, head, x, y), given which of x and y are the tile and the group."""

    def __init__(self, grid_sizes: LandmarkTPUGrid, tile: int, group: int):
        self.sizes, self.tile, self.group = grid_sizes, tile, group

    def queries(self, width: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, H, P, W], a tile of queries."""
        return pl.BlockSpec((1, 1, TILE, width), lambda *i: (i[0], i[1], self._tile(i, ahead), 0))

    def per_query(self, height: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, H, R, P], R scalars per query along lanes."""
        return pl.BlockSpec((1, 1, height, TILE), lambda *i: (i[0], i[1], 0, self._tile(i, ahead)))

    def query_index(self, ahead: int = 0) -> pl.BlockSpec:
        """[B, 1, P], an integer per query."""
        return pl.BlockSpec((1, 1, TILE), lambda *i: (i[0], 0, self._tile(i, ahead)))

    def keys(self, width: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, G, P, W], a tile of keys."""
        share = self.sizes.heads_per_group
        return pl.BlockSpec((1, 1, TILE, width), lambda *i: (i[0], i[1] // share, self._tile(i, ahead), 0))

    def key_index(self, ahead: int = 0) -> pl.BlockSpec:
        """[B, P, 1], an integer per key."""
        return pl.BlockSpec((1, TILE, 1), lambda *i: (i[0], self._tile(i, ahead), 0))

    def blocks(self, count: int, width: int, shared: bool = True) -> pl.BlockSpec:
        """[B, G, N * count, W]; [B, H, N * count, W] if not shared."""
        share = self.sizes.heads_per_group if shared else 1
        return pl.BlockSpec((1, 1, count, width), lambda *i: (i[0], i[1] // share, i[self.group], 0))

    def block_index(self) -> pl.BlockSpec:
        """[B, M, 1], an integer per block."""
        return pl.BlockSpec((1, self.sizes.blocks_per_group, 1), lambda *i: (i[0], i[self.group], 0))

    def _tile(self, i: tuple, ahead: int) -> Any:
        return jnp.clip(i[self.tile] + ahead, 0, self.sizes.num_tiles - 1)


def _pallas_call(
    name: str,
    kernel: Any,
    grid_sizes: LandmarkTPUGrid,
    grid: tuple[int, ...],
    group_start_time: Array,
    inputs: Any,
    outputs: Any,
    scratch: Any = (),
) -> Any:
    """Call a kernel with the group start times prefetched as scalars.

    Args:
        name: Name of the kernel.
        kernel: The kernel function.
        grid_sizes: Static sizes.
        grid: The grid; its fourth axis, if there is one, is sequential.
        group_start_time: Time of the first landmark of each group.
        inputs: Pairs of array and block specification.
        outputs: Pairs of shape and block specification.
        scratch: Shapes of float32 scratch arrays.
    """
    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, grid_sizes, arrays[0].dtype),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")[: len(grid)]
        ),
        interpret=INTERPRET_PARAMS if interpreting() else False,
        name=name,
    )(group_start_time, *arrays)


def _query_tile_operands(inputs: _LandmarkOperands, specs: _LandmarkBlockSpecs) -> list:
    """Return the inputs of the forward and the dq kernel with their block specifications."""
    q, k, v, landmark_k, block_k, block_v, indices = inputs
    width, values, keys = q.shape[-1], v.shape[-1], specs.sizes.blocks_per_group * specs.sizes.padded_block_size
    return [
        (q, specs.queries(width)),
        (k, specs.keys(width, -1)),
        (k, specs.keys(width)),
        (v, specs.keys(values, -1)),
        (v, specs.keys(values)),
        (indices.block_start_q, specs.query_index()),
        (indices.document_q, specs.query_index()),
        (indices.block_start_k, specs.key_index(-1)),
        (indices.block_start_k, specs.key_index()),
        (landmark_k, specs.blocks(specs.sizes.blocks_per_group, width)),
        (block_k, specs.blocks(keys, width)),
        (block_v, specs.blocks(keys, values)),
        (indices.document_block, specs.block_index()),
        (indices.landmark_time, specs.block_index()),
    ]


class _LandmarkResiduals(NamedTuple):
    inputs: _LandmarkOperands
    out: Float[Array, "B H P V"]
    lse: Float[Array, "B H 1 P"]
    """Log-sum-exp of the logits."""


class _OutputGrads(NamedTuple):
    """Residuals and gradients per query that all backward kernels read."""

    out_grad: Float[Array, "B H P V"]
    lse: Float[Array, "B H 1 P"]
    delta: Float[Array, "B H 1 P"]
    """D = do.o"""

    def operands(self, specs: _LandmarkBlockSpecs, ahead: int = 0) -> list:
        values = self.out_grad.shape[-1]
        return [
            (self.out_grad, specs.queries(values, ahead)),
            (self.lse, specs.per_query(1, ahead)),
            (self.delta, specs.per_query(1, ahead)),
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(inputs: _LandmarkOperands, grid_sizes: LandmarkTPUGrid) -> Float[Array, "B H P V"]:
    return _forward(inputs, grid_sizes)[0]


def _forward(
    inputs: _LandmarkOperands, grid_sizes: LandmarkTPUGrid
) -> tuple[Float[Array, "B H P V"], _LandmarkResiduals]:
    rows, heads, tiles, groups = _query_grid(grid_sizes)
    specs, values, length = _LandmarkBlockSpecs(grid_sizes, 2, 3), inputs.v.shape[-1], inputs.q.shape[2]
    outputs = (
        (output_shape(rows, heads, values, length, dtype=inputs.v.dtype), specs.per_query(values)),
        (output_shape(rows, heads, 1, length), specs.per_query(1)),
    )
    out, lse = _pallas_call(
        "landmark_attention_fwd",
        forward_kernel,
        grid_sizes,
        (rows, heads, tiles, groups),
        inputs.indices.group_start_time,
        _query_tile_operands(inputs, specs),
        outputs,
        ((1, TILE), (1, TILE), (values, TILE)),
    )
    out = jnp.swapaxes(out, 2, 3)
    return out, _LandmarkResiduals(inputs, out, lse)


def _query_grid(grid_sizes: LandmarkTPUGrid) -> tuple[int, int, int, int]:
    return grid_sizes.batch, grid_sizes.num_heads, grid_sizes.num_tiles, grid_sizes.num_groups


def _backward(
    grid_sizes: LandmarkTPUGrid, residuals: _LandmarkResiduals, out_grad: Float[Array, "B H P V"]
) -> tuple[_LandmarkOperands]:
    inputs, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * out_grad.astype(jnp.float32), axis=-1)[:, :, None]
    grads = _OutputGrads(out_grad, lse, delta)
    key_value_grads = (*_local_dkv(grid_sizes, inputs, grads), *_past_dkv(grid_sizes, inputs, grads))
    # The kernels return one gradient per query head; those that share a key/value head are summed here.
    dk, dv, dlandmark, dblock_k, dblock_v = (
        sum_per_group(grad, x.shape[1]).astype(x.dtype) for x, grad in zip(inputs[1:6], key_value_grads, strict=True)
    )
    dq = jnp.swapaxes(_dq(grid_sizes, inputs, grads), 2, 3).astype(inputs.q.dtype)
    # Integer inputs have no gradient.
    return (_LandmarkOperands(dq, dk, dv, dlandmark, dblock_k, dblock_v, None),)  # pyright: ignore[reportArgumentType]


_attend.defvjp(_forward, _backward)


def _dq(grid_sizes: LandmarkTPUGrid, inputs: _LandmarkOperands, grads: _OutputGrads) -> Float[Array, "B H K P"]:
    rows, heads, tiles, groups = _query_grid(grid_sizes)
    width, length = inputs.q.shape[-1], inputs.q.shape[2]
    specs = _LandmarkBlockSpecs(grid_sizes, 2, 3)
    (dq,) = _pallas_call(
        "landmark_attention_dq",
        dq_kernel,
        grid_sizes,
        (rows, heads, tiles, groups),
        inputs.indices.group_start_time,
        [*_query_tile_operands(inputs, specs), *grads.operands(specs)],
        ((output_shape(rows, heads, width, length), specs.per_query(width)),),
    )
    return dq


def _past_dkv(grid_sizes: LandmarkTPUGrid, inputs: _LandmarkOperands, grads: _OutputGrads) -> tuple[Array, ...]:
    """Gradients of the landmarks, keys and values of past blocks, per query head."""
    rows, heads, tiles, groups = _query_grid(grid_sizes)
    width, values = inputs.q.shape[-1], inputs.v.shape[-1]
    blocks = grid_sizes.blocks_per_group
    keys = blocks * grid_sizes.padded_block_size
    specs, indices = _LandmarkBlockSpecs(grid_sizes, 3, 2), inputs.indices
    operands = [
        (inputs.q, specs.queries(width)),
        (indices.document_q, specs.query_index()),
        (inputs.landmark_k, specs.blocks(blocks, width)),
        (inputs.block_k, specs.blocks(keys, width)),
        (inputs.block_v, specs.blocks(keys, values)),
        (indices.document_block, specs.block_index()),
        (indices.landmark_time, specs.block_index()),
        *grads.operands(specs),
    ]
    outputs = tuple(
        (output_shape(rows, heads, groups * count, w), specs.blocks(count, w, shared=False))
        for count, w in ((blocks, width), (keys, width), (keys, values))
    )
    grid = (rows, heads, groups, tiles)
    return _pallas_call(
        "landmark_attention_dkv_past", past_dkv_kernel, grid_sizes, grid, indices.group_start_time, operands, outputs
    )


def _local_dkv(grid_sizes: LandmarkTPUGrid, inputs: _LandmarkOperands, grads: _OutputGrads) -> tuple[Array, ...]:
    """Gradients of the keys and values from the queries of their own blocks, per query head."""
    rows, heads, tiles, _ = _query_grid(grid_sizes)
    width, values, length = inputs.q.shape[-1], inputs.v.shape[-1], inputs.q.shape[2]
    specs, indices = _LandmarkBlockSpecs(grid_sizes, 2, 2), inputs.indices
    operands = [
        (inputs.k, specs.keys(width)),
        (inputs.v, specs.keys(values)),
        (indices.block_start_k, specs.key_index()),
    ]
    for ahead in (0, 1):
        operands += [(inputs.q, specs.queries(width, ahead)), (indices.block_start_q, specs.query_index(ahead))]
        operands += grads.operands(specs, ahead)
    outputs = tuple((output_shape(rows, heads, length, w), specs.queries(w)) for w in (width, values))
    grid = (rows, heads, tiles)
    return _pallas_call(
        "landmark_attention_dkv_own", local_dkv_kernel, grid_sizes, grid, indices.group_start_time, operands, outputs
    )
