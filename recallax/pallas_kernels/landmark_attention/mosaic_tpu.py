"""Landmark attention on TPUs: one pass over the blocks with a running softmax, and a split backward pass.

Scores stand with keys along sublanes and queries along lanes, so that the softmax inside a block is a sum over rows of
whole registers, whatever the block's length. A past block enters as one logit, its landmark's, whose value is the
average inside the block. A program takes a tile of queries of one head; past blocks come in groups, the last axis of
its grid, and groups that end after the tile are passed over. The own block is met once, in the tile's keys and the
tile's before it.

Backward (D = do.o, o_b = sum_j r_bj v_j, with p from the saved logarithm of the sum and r computed again):

    own tokens dS = p_j (do.v_j - D);   landmarks dS = p_b (do.o_b - D);   past tokens dS = p_b r_bj (do.v_j - do.o_b)

dQ in the order of the forward pass; dK and dV of past blocks with queries as the last axis; those of own blocks in one
program per tile of keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.dispatch import Unsupported, use_interpreter
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache, complete_blocks
from recallax.pallas_kernels.landmark_attention.xla import MASKED_LOGIT, documents_or_single
from recallax.pallas_kernels.mosaic_tpu.chunk_scan import (
    INTERPRET_PARAMS,
    output_shape,
    require_uniform_dtype,
    sum_per_group,
)

TILE = 128
"""Queries of a program, and keys of an own block's tile."""
KEYS_PER_GROUP = 512
"""Keys of a group of past blocks, about."""
SUBLANES = 8


class LandmarkTPUGrid(NamedTuple):
    """What the programs are cut by; static."""

    batch: int
    num_heads: int
    heads_per_group: int
    """Query heads of a key/value head."""
    num_tiles: int
    block_size: int
    padded_block_size: int
    """Keys of a past block, filled up to whole sublanes."""
    blocks_per_group: int
    """Past blocks of a group."""
    num_groups: int
    interpret: bool


class LandmarkTPUIndices(NamedTuple):
    """Where tokens and blocks stand, along lanes for queries and along sublanes for keys."""

    group_start_time: Int[Array, "B N"]
    """Time of the first landmark of each group of blocks."""
    block_start_q: Int[Array, "B 1 P"]
    """When the own block began."""
    document_q: Int[Array, "B 1 P"]
    block_start_k: Int[Array, "B P 1"]
    """The same; below every query's at landmarks and padding."""
    document_block: Int[Array, "B M 1"]
    landmark_time: Int[Array, "B M 1"]
    """Of the block's landmark; the row's length where there is no block."""


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    block_size: int,
    cache: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """Whole rows, packed or not; q is scaled already."""
    interpret = use_interpreter("tpu")
    if cache is not None:
        raise Unsupported("blocks from before the row are given; the kernel takes whole rows only")
    if block_size > TILE:
        raise Unsupported(f"a block has {block_size} tokens; its tile of keys holds {TILE} of them")
    require_uniform_dtype(q=q, k=k, v=v)
    rows, length, heads, _ = q.shape
    docs = documents_or_single(segment_ids, positions)
    blocks = complete_blocks(k, v, docs, positions, block_size, None)
    whole = -(-block_size // SUBLANES) * SUBLANES
    count = blocks.landmark_time.shape[1]
    per_group = -(-min(count, max(1, KEYS_PER_GROUP // whole)) // SUBLANES) * SUBLANES
    tiles, groups = -(-length // TILE), -(-count // per_group)
    sizes = LandmarkTPUGrid(rows, heads, heads // k.shape[2], tiles, block_size, whole, per_group, groups, interpret)

    behind, more = tiles * TILE - length, groups * per_group - count
    place, time = positions % (block_size + 1), jnp.arange(length)[None]
    begin = jnp.where(docs.valid & (place < block_size), time - place, -block_size - 1)
    over_time, over_blocks = ((0, 0), (0, behind)), ((0, 0), (0, more))
    times = jnp.pad(blocks.landmark_time, over_blocks, constant_values=length)
    where = LandmarkTPUIndices(
        times.reshape(rows, groups, per_group).min(axis=2),
        jnp.pad(time - place, over_time, constant_values=-2 * block_size - 2)[:, None],
        jnp.pad(docs.index, over_time, constant_values=-1)[:, None],
        jnp.pad(begin, over_time, constant_values=-block_size - 1)[..., None],
        jnp.pad(blocks.document_index, over_blocks)[..., None],
        times[..., None],
    )
    tokens = tuple(jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, behind), (0, 0))) for x in (q, k, v))
    marks = jnp.pad(jnp.moveaxis(blocks.landmark_k, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))

    def flat(x: Float[Array, "B M L G W"]) -> Float[Array, "B G S W"]:
        x = jnp.pad(x, ((0, 0), (0, more), (0, whole - block_size), (0, 0), (0, 0)))
        return jnp.moveaxis(x, 3, 1).reshape(rows, x.shape[3], -1, x.shape[-1])

    out = _attend(*tokens, marks, flat(blocks.k), flat(blocks.v), where, sizes)
    return jnp.moveaxis(out, 2, 1)[:, :length]


def _dot_general(i: int, j: int, a: Array, b: Array, dtype: Any) -> Array:
    """The product over axis i of a and j of b, rounded to `dtype` before it; float32 ones are multiplied exactly."""
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    axes = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), axes, precision=exact, preferred_element_type=jnp.float32
    )


_dot = functools.partial(_dot_general, 1, 0)
_dot_nt = functools.partial(_dot_general, 1, 1)
_dot_tn = functools.partial(_dot_general, 0, 0)


class _LocalScores(NamedTuple):
    """A tile of queries against a tile of keys of their own blocks: scores and what is seen, [keys, queries]."""

    scores: Array
    visible: Array


class _PastScores(NamedTuple):
    """A tile of queries against a group of past blocks."""

    logits: Array  # [blocks, queries], of the landmarks
    visible: Array
    block_softmax: Array  # [blocks, length, queries], the softmax inside each block


def _local_scores(
    q: Array, k: Array, begin_q: Array, begin_k: Array, start_q: Array, start_k: Array, dtype: Any
) -> _LocalScores:
    scores = _dot_nt(k, q, dtype)
    time_k = start_k + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    time_q = start_q + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return _LocalScores(scores, (begin_k == begin_q) & (time_k <= time_q) & (time_k >= 0))


def _past_scores(
    q: Array,
    landmark_k: Array,
    k: Array,
    document_q: Array,
    document_b: Array,
    time_b: Array,
    start: Array,
    grid_sizes: LandmarkTPUGrid,
    dtype: Any,
) -> _PastScores:
    logits = _dot_nt(landmark_k, q, dtype)
    time_q = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    scores = _dot_nt(k, q, dtype).reshape(grid_sizes.blocks_per_group, grid_sizes.padded_block_size, -1)
    if grid_sizes.block_size < grid_sizes.padded_block_size:
        scores = jnp.where(
            jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < grid_sizes.block_size, scores, MASKED_LOGIT
        )
    inside = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return _PastScores(
        logits, (document_b == document_q) & (time_b < time_q), inside / inside.sum(axis=1, keepdims=True)
    )


def _flatten_blocks(x: Float[Array, "M L Q"]) -> Float[Array, "S Q"]:
    return x.reshape(-1, x.shape[-1])


def _forward_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, group_start_time: Any, *refs: Any) -> None:
    q, k0, k1, v0, v1, begin_q, document_q, b0, b1, marks, kb, vb, db, tb, out, lse, most, total, acc = refs
    row, tile, group = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE
    queries = _load(q)

    @pl.when(group == 0)
    def _() -> None:
        before = _local_scores(queries, _load(k0), begin_q[0], b0[0], start, start - TILE, dtype)
        here = _local_scores(queries, _load(k1), begin_q[0], b1[0], start, start, dtype)
        logits = [jnp.where(part.visible, part.scores, MASKED_LOGIT) for part in (before, here)]
        highest = jnp.maximum(*(x.max(axis=0, keepdims=True) for x in logits))
        shares = [jnp.where(p.visible, jnp.exp(p.scores - highest), 0) for p in (before, here)]
        most[...], total[...] = highest, sum(x.sum(axis=0, keepdims=True) for x in shares)
        acc[...] = _dot_tn(_load(v0), shares[0], dtype) + _dot_tn(_load(v1), shares[1], dtype)

    @pl.when(group_start_time[row, group] < start + TILE)
    def _() -> None:
        part = _past_scores(queries, _load(marks), _load(kb), document_q[0], db[0], tb[0], start, grid_sizes, dtype)
        highest = jnp.maximum(most[...], jnp.where(part.visible, part.logits, MASKED_LOGIT).max(axis=0, keepdims=True))
        shrink = jnp.exp(most[...] - highest)
        chosen = jnp.where(part.visible, jnp.exp(part.logits - highest), 0)
        acc[...] = acc[...] * shrink + _dot_tn(_load(vb), _flatten_blocks(part.block_softmax * chosen[:, None]), dtype)
        total[...] = total[...] * shrink + chosen.sum(axis=0, keepdims=True)
        most[...] = highest

    @pl.when(group == grid_sizes.num_groups - 1)
    def _() -> None:
        some = total[...] > 0
        share = jnp.where(some, total[...], 1)
        out[0, 0] = (acc[...] / share).astype(out.dtype)
        lse[0, 0] = jnp.where(some, most[...] + jnp.log(share), 0)


def _dq_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, group_start_time: Any, *refs: Any) -> None:
    q, k0, k1, v0, v1, begin_q, document_q, b0, b1, marks, kb, vb, db, tb, slope, lse, delta, dq = refs
    row, tile, group = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE
    queries, do = _load(q), _load(slope)

    @pl.when(group == 0)
    def _() -> None:
        grad = jnp.zeros(dq.shape[2:], jnp.float32)
        for k, v, begin, at in ((k0, v0, b0, start - TILE), (k1, v1, b1, start)):
            part = _local_scores(queries, _load(k), begin_q[0], begin[0], start, at, dtype)
            grad += _dot_tn(_load(k), _local_score_grads(part, _load(v), do, lse[0, 0], delta[0, 0], dtype)[1], dtype)
        dq[0, 0] = grad

    @pl.when(group_start_time[row, group] < start + TILE)
    def _() -> None:
        part = _past_scores(queries, _load(marks), _load(kb), document_q[0], db[0], tb[0], start, grid_sizes, dtype)
        _, of_marks, of_keys = _past_score_grads(part, _load(vb), do, lse[0, 0], delta[0, 0], dtype)
        dq[0, 0] += _dot_tn(_load(marks), of_marks, dtype) + _dot_tn(_load(kb), of_keys, dtype)


def _past_dkv_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, group_start_time: Any, *refs: Any) -> None:
    q, document_q, marks, kb, vb, db, tb, slope, lse, delta, dmarks, dk, dv = refs
    row, group, tile = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE

    @pl.when(tile == 0)
    def _() -> None:
        for ref in (dmarks, dk, dv):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(group_start_time[row, group] < start + TILE)
    def _() -> None:
        queries, do = _load(q), _load(slope)
        part = _past_scores(queries, _load(marks), _load(kb), document_q[0], db[0], tb[0], start, grid_sizes, dtype)
        weights, of_marks, of_keys = _past_score_grads(part, _load(vb), do, lse[0, 0], delta[0, 0], dtype)
        dmarks[0, 0] += _dot(of_marks, queries, dtype)
        dk[0, 0] += _dot(of_keys, queries, dtype)
        dv[0, 0] += _dot(weights, do, dtype)


def _local_dkv_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, _: Any, *refs: Any) -> None:
    k, v, begin_k, *tiles, dk, dv = refs
    tile = pl.program_id(2)
    at = tile * TILE
    for number, (q, begin_q, slope, lse, delta) in enumerate((tiles[:5], tiles[5:])):
        queries, do = _load(q), _load(slope)
        part = _local_scores(queries, _load(k), begin_q[0], begin_k[0], at + number * TILE, at, dtype)
        part = part._replace(
            visible=part.visible & (tile + number < grid_sizes.num_tiles)
        )  # behind the last tile stands it again
        weights, slopes = _local_score_grads(part, _load(v), do, lse[0, 0], delta[0, 0], dtype)
        grads = _dot(slopes, queries, dtype), _dot(weights, do, dtype)
        for ref, grad in zip((dk, dv), grads, strict=True):
            ref[0, 0] = grad if number == 0 else ref[0, 0] + grad


def _local_score_grads(
    part: _LocalScores, v: Array, do: Array, lse: Array, delta: Array, dtype: Any
) -> tuple[Array, Array]:
    """Weights, and the scores' slopes."""
    weights = jnp.where(part.visible, jnp.exp(part.scores - lse), 0)
    return weights, weights * (_dot_nt(v, do, dtype) - delta)


def _past_score_grads(
    part: _PastScores, v: Array, do: Array, lse: Array, delta: Array, dtype: Any
) -> tuple[Array, Array, Array]:
    """Weights of values, and the slopes of landmarks' and of keys' scores."""
    p = jnp.where(part.visible, jnp.exp(part.logits - lse), 0)
    of_values = _dot_nt(v, do, dtype).reshape(part.block_softmax.shape)
    average = (part.block_softmax * of_values).sum(axis=1)
    weights = part.block_softmax * p[:, None]
    return _flatten_blocks(weights), p * (average - delta), _flatten_blocks(weights * (of_values - average[:, None]))


def _load(ref: Any) -> Array:
    return ref[0, 0].astype(jnp.float32)


class _LandmarkBlockSpecs:
    """Blocks of a grid (row, head, x, y), given which of its indices are the tile and the group."""

    def __init__(self, grid_sizes: LandmarkTPUGrid, tile: int, group: int):
        self.sizes, self.tile, self.group = grid_sizes, tile, group

    def queries(self, width: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, H, P, W]"""
        return pl.BlockSpec((1, 1, TILE, width), lambda *at: (at[0], at[1], self._tile(at, ahead), 0))

    def per_query(self, height: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, H, R, P], numbers per query along lanes."""
        return pl.BlockSpec((1, 1, height, TILE), lambda *at: (at[0], at[1], 0, self._tile(at, ahead)))

    def query_index(self, ahead: int = 0) -> pl.BlockSpec:
        """[B, 1, P]"""
        return pl.BlockSpec((1, 1, TILE), lambda *at: (at[0], 0, self._tile(at, ahead)))

    def keys(self, width: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, G, P, W]"""
        share = self.sizes.heads_per_group
        return pl.BlockSpec((1, 1, TILE, width), lambda *at: (at[0], at[1] // share, self._tile(at, ahead), 0))

    def key_index(self, ahead: int = 0) -> pl.BlockSpec:
        """[B, P, 1]"""
        return pl.BlockSpec((1, TILE, 1), lambda *at: (at[0], self._tile(at, ahead), 0))

    def blocks(self, count: int, width: int, shared: bool = True) -> pl.BlockSpec:
        """[B, G, N * count, W], or [B, H, N * count, W]"""
        share = self.sizes.heads_per_group if shared else 1
        return pl.BlockSpec((1, 1, count, width), lambda *at: (at[0], at[1] // share, at[self.group], 0))

    def block_index(self) -> pl.BlockSpec:
        """[B, M, 1]"""
        return pl.BlockSpec((1, self.sizes.blocks_per_group, 1), lambda *at: (at[0], at[self.group], 0))

    def _tile(self, at: tuple, ahead: int) -> Any:
        return jnp.clip(at[self.tile] + ahead, 0, self.sizes.num_tiles - 1)


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
    """Run a kernel; given: (array, spec) pairs, made: (shape, spec) pairs."""
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
        interpret=INTERPRET_PARAMS if grid_sizes.interpret else False,
        name=name,
    )(group_start_time, *arrays)


def _query_tile_operands(
    q: Array,
    k: Array,
    v: Array,
    landmark_k: Array,
    kb: Array,
    vb: Array,
    indices: LandmarkTPUIndices,
    specs: _LandmarkBlockSpecs,
) -> list:
    """What forward and dQ read."""
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
        (kb, specs.blocks(keys, width)),
        (vb, specs.blocks(keys, values)),
        (indices.document_block, specs.block_index()),
        (indices.landmark_time, specs.block_index()),
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(
    q: Array,
    k: Array,
    v: Array,
    landmark_k: Array,
    kb: Array,
    vb: Array,
    indices: LandmarkTPUIndices,
    grid_sizes: LandmarkTPUGrid,
) -> Float[Array, "B H P V"]:
    return _forward(q, k, v, landmark_k, kb, vb, indices, grid_sizes)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    landmark_k: Array,
    kb: Array,
    vb: Array,
    indices: LandmarkTPUIndices,
    grid_sizes: LandmarkTPUGrid,
) -> tuple[Float[Array, "B H P V"], tuple]:
    specs, values, length = _LandmarkBlockSpecs(grid_sizes, 2, 3), v.shape[-1], q.shape[2]
    given = _query_tile_operands(q, k, v, landmark_k, kb, vb, indices, specs)
    made = (
        (output_shape(grid_sizes.batch, grid_sizes.num_heads, values, length, dtype=v.dtype), specs.per_query(values)),
        (output_shape(grid_sizes.batch, grid_sizes.num_heads, 1, length), specs.per_query(1)),
    )
    grid = (grid_sizes.batch, grid_sizes.num_heads, grid_sizes.num_tiles, grid_sizes.num_groups)
    scratch = ((1, TILE), (1, TILE), (values, TILE))
    out, lse = _pallas_call(
        "landmark_attention_fwd", _forward_kernel, grid_sizes, grid, indices.group_start_time, given, made, scratch
    )
    out = jnp.swapaxes(out, 2, 3)
    return out, (q, k, v, landmark_k, kb, vb, indices, out, lse)


def _backward(grid_sizes: LandmarkTPUGrid, residuals: tuple, output_grad: Float[Array, "B H P V"]) -> tuple:
    q, k, v, marks, kb, vb, where, out, lse = residuals
    width, values, length = q.shape[-1], v.shape[-1], q.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * output_grad.astype(jnp.float32), axis=-1)[:, :, None]
    rows, heads, keys = (
        grid_sizes.batch,
        grid_sizes.num_heads,
        grid_sizes.blocks_per_group * grid_sizes.padded_block_size,
    )

    specs = _LandmarkBlockSpecs(grid_sizes, 2, 3)
    given = _query_tile_operands(q, k, v, marks, kb, vb, where, specs)
    given += [(output_grad, specs.queries(values)), (lse, specs.per_query(1)), (delta, specs.per_query(1))]
    made = ((output_shape(rows, heads, width, length), specs.per_query(width)),)
    grid = (rows, heads, grid_sizes.num_tiles, grid_sizes.num_groups)
    (dq,) = _pallas_call("landmark_attention_dq", _dq_kernel, grid_sizes, grid, where.group_start_time, given, made)

    specs = _LandmarkBlockSpecs(grid_sizes, 3, 2)
    given = [
        (q, specs.queries(width)),
        (where.document_q, specs.query_index()),
        (marks, specs.blocks(grid_sizes.blocks_per_group, width)),
        (kb, specs.blocks(keys, width)),
        (vb, specs.blocks(keys, values)),
        (where.document_block, specs.block_index()),
        (where.landmark_time, specs.block_index()),
        (output_grad, specs.queries(values)),
        (lse, specs.per_query(1)),
        (delta, specs.per_query(1)),
    ]
    counts = (grid_sizes.blocks_per_group, width), (keys, width), (keys, values)
    made = tuple(
        (output_shape(rows, heads, grid_sizes.num_groups * n, w), specs.blocks(n, w, shared=False)) for n, w in counts
    )
    grid = (rows, heads, grid_sizes.num_groups, grid_sizes.num_tiles)
    of_blocks = _pallas_call(
        "landmark_attention_dkv_past", _past_dkv_kernel, grid_sizes, grid, where.group_start_time, given, made
    )

    specs = _LandmarkBlockSpecs(grid_sizes, 2, 2)
    given = [(k, specs.keys(width)), (v, specs.keys(values)), (where.block_start_k, specs.key_index())]
    for ahead in (0, 1):
        given += [(q, specs.queries(width, ahead)), (where.block_start_q, specs.query_index(ahead))]
        given += [
            (output_grad, specs.queries(values, ahead)),
            (lse, specs.per_query(1, ahead)),
            (delta, specs.per_query(1, ahead)),
        ]
    made = tuple((output_shape(rows, heads, length, w), specs.queries(w)) for w in (width, values))
    grid = (rows, heads, grid_sizes.num_tiles)
    of_tokens = _pallas_call(
        "landmark_attention_dkv_own", _local_dkv_kernel, grid_sizes, grid, where.group_start_time, given, made
    )

    def like(x: Array, grad: Array) -> Array:
        """Summed over the query heads that share a key/value head."""
        return sum_per_group(grad, x.shape[1]).astype(x.dtype)

    shared = (like(x, grad) for x, grad in zip((k, v, marks, kb, vb), (*of_tokens, *of_blocks), strict=True))
    return jnp.swapaxes(dq, 2, 3).astype(q.dtype), *shared, None


_attend.defvjp(_forward, _backward)
