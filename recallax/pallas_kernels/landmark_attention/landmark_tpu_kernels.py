"""Kernels of landmark attention on TPUs, for one tile of queries or keys of one head.

Scores have keys along sublanes and queries along lanes, so that the softmax within a block is a sum over rows of whole
registers for any block size. `mosaic_tpu.py` explains the passes and calls the kernels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from recallax.pallas_kernels.masked_logit import MASKED_LOGIT

TILE = 128
"""Queries of a program, and keys of a tile of the queries' own blocks: the lanes of a register."""


class LandmarkTPUGrid(NamedTuple):
    """Static sizes of the grids."""

    batch: int
    num_heads: int
    heads_per_group: int
    """Query heads per key/value head."""
    num_tiles: int
    block_size: int
    padded_block_size: int
    """Keys of a past block, padded to whole sublanes."""
    blocks_per_group: int
    """Past blocks per group, a step of the sequential grid axis."""
    num_groups: int


def _dot_general(i: int, j: int, a: Array, b: Array, dtype: Any) -> Array:
    """Contract axis i of a with axis j of b; operands are rounded to `dtype`, float32 uses the highest precision."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    axes = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), axes, precision=precision, preferred_element_type=jnp.float32
    )


_dot = functools.partial(_dot_general, 1, 0)
_dot_nt = functools.partial(_dot_general, 1, 1)
_dot_tn = functools.partial(_dot_general, 0, 0)


class _PastBlockRefs(NamedTuple):
    """References to the arrays of a group of past blocks."""

    landmark_k: Any
    k: Any
    v: Any
    document_index: Any
    landmark_time: Any


def _unpack_query_operands(refs: list[Any]) -> tuple[Any, tuple, tuple, Any, Any, tuple, _PastBlockRefs]:
    """Group the references of the operands that the forward and dq kernels share, in the order of the call.

    Returns:
        q, the keys of the previous and the same tile, their values, the starts of the queries' blocks, the queries'
        documents, the starts of the keys' blocks of both tiles, and the past blocks.
    """
    q, k0, k1, v0, v1, block_start_q, document_q, start0, start1, *blocks = refs
    return q, (k0, k1), (v0, v1), block_start_q, document_q, (start0, start1), _PastBlockRefs(*blocks)


class _LocalScores(NamedTuple):
    """Scores of a tile of queries against a tile of keys of their own blocks, [keys, queries]."""

    scores: Array
    visible: Array
    """True where the query reads the key."""


class _PastScores(NamedTuple):
    """Scores of a tile of queries against a group of past blocks."""

    logits: Array
    """Scores of the landmarks [blocks, queries]."""
    visible: Array
    """True where the query reads the block [blocks, queries]."""
    block_softmax: Array
    """Softmax within each block [blocks, block size, queries]."""


def _local_scores(
    q: Array, k: Array, block_start_q: Array, block_start_k: Array, start_q: Array, start_k: Array, dtype: Any
) -> _LocalScores:
    scores = _dot_nt(k, q, dtype)
    time_k = start_k + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    time_q = start_q + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return _LocalScores(scores, (block_start_k == block_start_q) & (time_k <= time_q) & (time_k >= 0))


def _past_scores(
    q: Array, blocks: _PastBlockRefs, document_q: Array, start: Array, grid_sizes: LandmarkTPUGrid, dtype: Any
) -> _PastScores:
    logits = _dot_nt(_load(blocks.landmark_k), q, dtype)
    time_q = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    scores = _dot_nt(_load(blocks.k), q, dtype).reshape(grid_sizes.blocks_per_group, grid_sizes.padded_block_size, -1)
    if grid_sizes.block_size < grid_sizes.padded_block_size:
        scores = jnp.where(
            jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < grid_sizes.block_size, scores, MASKED_LOGIT
        )
    inside = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    visible = (blocks.document_index[0] == document_q) & (blocks.landmark_time[0] < time_q)
    return _PastScores(logits, visible, inside / inside.sum(axis=1, keepdims=True))


def _flatten_blocks(x: Float[Array, "M L Q"]) -> Float[Array, "S Q"]:
    return x.reshape(-1, x.shape[-1])


def forward_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, group_start_time: Any, *refs: Any) -> None:
    """Output and log-sum-exp of a tile of queries; the last grid axis runs over the groups of past blocks."""
    (*operands, out, lse, running_max, total, acc) = refs
    q, k_tiles, v_tiles, block_start_q, document_q, block_start_k, blocks = _unpack_query_operands(operands)
    row, tile, group = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE
    queries = _load(q)

    @pl.when(group == 0)
    def _() -> None:
        parts = [
            _local_scores(queries, _load(k), block_start_q[0], begin[0], start, start_k, dtype)
            for k, begin, start_k in zip(k_tiles, block_start_k, (start - TILE, start), strict=True)
        ]
        logits = [jnp.where(part.visible, part.scores, MASKED_LOGIT) for part in parts]
        highest = jnp.maximum(*(x.max(axis=0, keepdims=True) for x in logits))
        weights = [jnp.where(part.visible, jnp.exp(part.scores - highest), 0) for part in parts]
        running_max[...], total[...] = highest, sum(x.sum(axis=0, keepdims=True) for x in weights)
        acc[...] = _dot_tn(_load(v_tiles[0]), weights[0], dtype) + _dot_tn(_load(v_tiles[1]), weights[1], dtype)

    @pl.when(group_start_time[row, group] < start + TILE)
    def _() -> None:
        part = _past_scores(queries, blocks, document_q[0], start, grid_sizes, dtype)
        highest = jnp.maximum(
            running_max[...], jnp.where(part.visible, part.logits, MASKED_LOGIT).max(axis=0, keepdims=True)
        )
        rescale = jnp.exp(running_max[...] - highest)
        weights = jnp.where(part.visible, jnp.exp(part.logits - highest), 0)
        acc[...] = acc[...] * rescale + _dot_tn(
            _load(blocks.v), _flatten_blocks(part.block_softmax * weights[:, None]), dtype
        )
        total[...] = total[...] * rescale + weights.sum(axis=0, keepdims=True)
        running_max[...] = highest

    @pl.when(group == grid_sizes.num_groups - 1)
    def _() -> None:
        any_visible = total[...] > 0
        denominator = jnp.where(any_visible, total[...], 1)
        out[0, 0] = (acc[...] / denominator).astype(out.dtype)
        lse[0, 0] = jnp.where(any_visible, running_max[...] + jnp.log(denominator), 0)


def dq_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, group_start_time: Any, *refs: Any) -> None:
    """Gradient of a tile of queries; the last grid axis runs over the groups of past blocks."""
    (*operands, out_grad, lse, delta, dq) = refs
    q, k_tiles, v_tiles, block_start_q, document_q, block_start_k, blocks = _unpack_query_operands(operands)
    row, tile, group = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE
    queries, do = _load(q), _load(out_grad)

    @pl.when(group == 0)
    def _() -> None:
        grad = jnp.zeros(dq.shape[2:], jnp.float32)
        for k, v, begin, start_k in zip(k_tiles, v_tiles, block_start_k, (start - TILE, start), strict=True):
            part = _local_scores(queries, _load(k), block_start_q[0], begin[0], start, start_k, dtype)
            grad += _dot_tn(_load(k), _local_score_grads(part, _load(v), do, lse[0, 0], delta[0, 0], dtype)[1], dtype)
        dq[0, 0] = grad

    @pl.when(group_start_time[row, group] < start + TILE)
    def _() -> None:
        part = _past_scores(queries, blocks, document_q[0], start, grid_sizes, dtype)
        _, landmark_grads, key_grads = _past_score_grads(part, _load(blocks.v), do, lse[0, 0], delta[0, 0], dtype)
        dq[0, 0] += _dot_tn(_load(blocks.landmark_k), landmark_grads, dtype)
        dq[0, 0] += _dot_tn(_load(blocks.k), key_grads, dtype)


def past_dkv_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, group_start_time: Any, *refs: Any) -> None:
    """Gradients of a group of past blocks; the last grid axis runs over the tiles of queries."""
    q, document_q, *block_refs, out_grad, lse, delta, dlandmark, dk, dv = refs
    blocks = _PastBlockRefs(*block_refs)
    row, group, tile = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE

    @pl.when(tile == 0)
    def _() -> None:
        for ref in (dlandmark, dk, dv):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(group_start_time[row, group] < start + TILE)
    def _() -> None:
        queries, do = _load(q), _load(out_grad)
        part = _past_scores(queries, blocks, document_q[0], start, grid_sizes, dtype)
        weights, landmark_grads, key_grads = _past_score_grads(part, _load(blocks.v), do, lse[0, 0], delta[0, 0], dtype)
        dlandmark[0, 0] += _dot(landmark_grads, queries, dtype)
        dk[0, 0] += _dot(key_grads, queries, dtype)
        dv[0, 0] += _dot(weights, do, dtype)


def local_dkv_kernel(grid_sizes: LandmarkTPUGrid, dtype: Any, _: Any, *refs: Any) -> None:
    """Gradients of a tile of keys and values from the queries of their own blocks, in this tile and the next."""
    k, v, block_start_k, *tiles, dk, dv = refs
    tile = pl.program_id(2)
    start_k = tile * TILE
    for ahead, (q, block_start_q, out_grad, lse, delta) in enumerate((tiles[:5], tiles[5:])):
        queries, do = _load(q), _load(out_grad)
        part = _local_scores(
            queries, _load(k), block_start_q[0], block_start_k[0], start_k + ahead * TILE, start_k, dtype
        )
        # The tile ahead of the last one is clamped to the last one.
        part = part._replace(visible=part.visible & (tile + ahead < grid_sizes.num_tiles))
        weights, score_grads = _local_score_grads(part, _load(v), do, lse[0, 0], delta[0, 0], dtype)
        grads = _dot(score_grads, queries, dtype), _dot(weights, do, dtype)
        for ref, grad in zip((dk, dv), grads, strict=True):
            ref[0, 0] = grad if ahead == 0 else ref[0, 0] + grad


def _local_score_grads(
    part: _LocalScores, v: Array, do: Array, lse: Array, delta: Array, dtype: Any
) -> tuple[Array, Array]:
    """Return the attention weights and the gradients of the scores."""
    weights = jnp.where(part.visible, jnp.exp(part.scores - lse), 0)
    return weights, weights * (_dot_nt(v, do, dtype) - delta)


def _past_score_grads(
    part: _PastScores, v: Array, do: Array, lse: Array, delta: Array, dtype: Any
) -> tuple[Array, Array, Array]:
    """Return the weights of values, and the gradients of the scores of landmarks and of keys."""
    p = jnp.where(part.visible, jnp.exp(part.logits - lse), 0)
    value_dots = _dot_nt(v, do, dtype).reshape(part.block_softmax.shape)
    average = (part.block_softmax * value_dots).sum(axis=1)
    weights = part.block_softmax * p[:, None]
    return _flatten_blocks(weights), p * (average - delta), _flatten_blocks(weights * (value_dots - average[:, None]))


def _load(ref: Any) -> Array:
    """Load the matrix of a block in float32."""
    return ref[0, 0].astype(jnp.float32)
