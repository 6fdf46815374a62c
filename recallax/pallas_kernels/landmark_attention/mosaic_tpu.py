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

from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.landmark_attention.blocks import LandmarkCache, complete_blocks
from recallax.pallas_kernels.landmark_attention.xla import NEVER, documents_of
from recallax.pallas_kernels.mosaic_tpu import INTERPRETER, per_group, require_dtypes, shaped

TILE = 128
"""Queries of a program, and keys of an own block's tile."""
KEYS = 512
"""Keys of a group of past blocks, about."""
SUBLANES = 8


class Sizes(NamedTuple):
    """What the programs are cut by; static."""

    rows: int
    heads: int
    share: int
    """Query heads of a key/value head."""
    tiles: int
    real: int
    length: int
    """Keys of a past block, filled up to whole sublanes."""
    blocks: int
    """Past blocks of a group."""
    groups: int
    interpret: bool


class Where(NamedTuple):
    """Where tokens and blocks stand, along lanes for queries and along sublanes for keys."""

    first: Int[Array, "B N"]
    """Time of the first landmark of each group of blocks."""
    begin_q: Int[Array, "B 1 P"]
    """When the own block began."""
    document_q: Int[Array, "B 1 P"]
    begin_k: Int[Array, "B P 1"]
    """The same; below every query's at landmarks and padding."""
    document_b: Int[Array, "B M 1"]
    time_b: Int[Array, "B M 1"]
    """Of the block's landmark; the row's length where there is no block."""


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    segments: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    real: int,
    past: LandmarkCache | None,
) -> Float[Array, "B T H V"]:
    """Whole rows, packed or not; q is scaled already."""
    interpret = interpreting("tpu")
    if past is not None:
        raise Unsupported("blocks from before the row are given; the kernel takes whole rows only")
    if real > TILE:
        raise Unsupported(f"a block has {real} tokens; its tile of keys holds {TILE} of them")
    require_dtypes(q=q, k=k, v=v)
    rows, length, heads, _ = q.shape
    docs = documents_of(segments, positions)
    blocks = complete_blocks(k, v, docs, positions, real, None)
    whole = -(-real // SUBLANES) * SUBLANES
    count = blocks.time.shape[1]
    per_group = -(-min(count, max(1, KEYS // whole)) // SUBLANES) * SUBLANES
    tiles, groups = -(-length // TILE), -(-count // per_group)
    sizes = Sizes(rows, heads, heads // k.shape[2], tiles, real, whole, per_group, groups, interpret)

    behind, more = tiles * TILE - length, groups * per_group - count
    place, time = positions % (real + 1), jnp.arange(length)[None]
    begin = jnp.where(docs.valid & (place < real), time - place, -real - 1)
    over_time, over_blocks = ((0, 0), (0, behind)), ((0, 0), (0, more))
    times = jnp.pad(blocks.time, over_blocks, constant_values=length)
    where = Where(
        times.reshape(rows, groups, per_group).min(axis=2),
        jnp.pad(time - place, over_time, constant_values=-2 * real - 2)[:, None],
        jnp.pad(docs.index, over_time, constant_values=-1)[:, None],
        jnp.pad(begin, over_time, constant_values=-real - 1)[..., None],
        jnp.pad(blocks.document, over_blocks)[..., None],
        times[..., None],
    )
    tokens = tuple(jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, behind), (0, 0))) for x in (q, k, v))
    marks = jnp.pad(jnp.moveaxis(blocks.marks, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))

    def flat(x: Float[Array, "B M L G W"]) -> Float[Array, "B G S W"]:
        x = jnp.pad(x, ((0, 0), (0, more), (0, whole - real), (0, 0), (0, 0)))
        return jnp.moveaxis(x, 3, 1).reshape(rows, x.shape[3], -1, x.shape[-1])

    out = _attend(*tokens, marks, flat(blocks.k), flat(blocks.v), where, sizes)
    return jnp.moveaxis(out, 2, 1)[:, :length]


def _contract(i: int, j: int, a: Array, b: Array, dtype: Any) -> Array:
    """The product over axis i of a and j of b, rounded to `dtype` before it; float32 ones are multiplied exactly."""
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    axes = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), axes, precision=exact, preferred_element_type=jnp.float32
    )


_ab = functools.partial(_contract, 1, 0)
_abt = functools.partial(_contract, 1, 1)
_atb = functools.partial(_contract, 0, 0)


class _Own(NamedTuple):
    """A tile of queries against a tile of keys of their own blocks: scores and what is seen, [keys, queries]."""

    scores: Array
    seen: Array


class _Past(NamedTuple):
    """A tile of queries against a group of past blocks."""

    logits: Array  # [blocks, queries], of the landmarks
    seen: Array
    inside: Array  # [blocks, length, queries], the softmax inside each block


def _own(q: Array, k: Array, begin_q: Array, begin_k: Array, start_q: Array, start_k: Array, dtype: Any) -> _Own:
    scores = _abt(k, q, dtype)
    time_k = start_k + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    time_q = start_q + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return _Own(scores, (begin_k == begin_q) & (time_k <= time_q) & (time_k >= 0))


def _past(
    q: Array,
    marks: Array,
    k: Array,
    document_q: Array,
    document_b: Array,
    time_b: Array,
    start: Array,
    sizes: Sizes,
    dtype: Any,
) -> _Past:
    logits = _abt(marks, q, dtype)
    time_q = start + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    scores = _abt(k, q, dtype).reshape(sizes.blocks, sizes.length, -1)
    if sizes.real < sizes.length:
        scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < sizes.real, scores, NEVER)
    inside = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return _Past(logits, (document_b == document_q) & (time_b < time_q), inside / inside.sum(axis=1, keepdims=True))


def _flat(x: Float[Array, "M L Q"]) -> Float[Array, "S Q"]:
    return x.reshape(-1, x.shape[-1])


def _forward_kernel(sizes: Sizes, dtype: Any, first: Any, *refs: Any) -> None:
    q, k0, k1, v0, v1, begin_q, document_q, b0, b1, marks, kb, vb, db, tb, out, lse, most, total, acc = refs
    row, tile, group = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE
    queries = _read(q)

    @pl.when(group == 0)
    def _() -> None:
        before = _own(queries, _read(k0), begin_q[0], b0[0], start, start - TILE, dtype)
        here = _own(queries, _read(k1), begin_q[0], b1[0], start, start, dtype)
        logits = [jnp.where(part.seen, part.scores, NEVER) for part in (before, here)]
        highest = jnp.maximum(*(x.max(axis=0, keepdims=True) for x in logits))
        shares = [jnp.where(p.seen, jnp.exp(p.scores - highest), 0) for p in (before, here)]
        most[...], total[...] = highest, sum(x.sum(axis=0, keepdims=True) for x in shares)
        acc[...] = _atb(_read(v0), shares[0], dtype) + _atb(_read(v1), shares[1], dtype)

    @pl.when(first[row, group] < start + TILE)
    def _() -> None:
        part = _past(queries, _read(marks), _read(kb), document_q[0], db[0], tb[0], start, sizes, dtype)
        highest = jnp.maximum(most[...], jnp.where(part.seen, part.logits, NEVER).max(axis=0, keepdims=True))
        shrink = jnp.exp(most[...] - highest)
        chosen = jnp.where(part.seen, jnp.exp(part.logits - highest), 0)
        acc[...] = acc[...] * shrink + _atb(_read(vb), _flat(part.inside * chosen[:, None]), dtype)
        total[...] = total[...] * shrink + chosen.sum(axis=0, keepdims=True)
        most[...] = highest

    @pl.when(group == sizes.groups - 1)
    def _() -> None:
        some = total[...] > 0
        share = jnp.where(some, total[...], 1)
        out[0, 0] = (acc[...] / share).astype(out.dtype)
        lse[0, 0] = jnp.where(some, most[...] + jnp.log(share), 0)


def _dq_kernel(sizes: Sizes, dtype: Any, first: Any, *refs: Any) -> None:
    q, k0, k1, v0, v1, begin_q, document_q, b0, b1, marks, kb, vb, db, tb, slope, lse, delta, dq = refs
    row, tile, group = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE
    queries, do = _read(q), _read(slope)

    @pl.when(group == 0)
    def _() -> None:
        grad = jnp.zeros(dq.shape[2:], jnp.float32)
        for k, v, begin, at in ((k0, v0, b0, start - TILE), (k1, v1, b1, start)):
            part = _own(queries, _read(k), begin_q[0], begin[0], start, at, dtype)
            grad += _atb(_read(k), _own_slopes(part, _read(v), do, lse[0, 0], delta[0, 0], dtype)[1], dtype)
        dq[0, 0] = grad

    @pl.when(first[row, group] < start + TILE)
    def _() -> None:
        part = _past(queries, _read(marks), _read(kb), document_q[0], db[0], tb[0], start, sizes, dtype)
        _, of_marks, of_keys = _past_slopes(part, _read(vb), do, lse[0, 0], delta[0, 0], dtype)
        dq[0, 0] += _atb(_read(marks), of_marks, dtype) + _atb(_read(kb), of_keys, dtype)


def _past_kernel(sizes: Sizes, dtype: Any, first: Any, *refs: Any) -> None:
    q, document_q, marks, kb, vb, db, tb, slope, lse, delta, dmarks, dk, dv = refs
    row, group, tile = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = tile * TILE

    @pl.when(tile == 0)
    def _() -> None:
        for ref in (dmarks, dk, dv):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(first[row, group] < start + TILE)
    def _() -> None:
        queries, do = _read(q), _read(slope)
        part = _past(queries, _read(marks), _read(kb), document_q[0], db[0], tb[0], start, sizes, dtype)
        weights, of_marks, of_keys = _past_slopes(part, _read(vb), do, lse[0, 0], delta[0, 0], dtype)
        dmarks[0, 0] += _ab(of_marks, queries, dtype)
        dk[0, 0] += _ab(of_keys, queries, dtype)
        dv[0, 0] += _ab(weights, do, dtype)


def _own_kernel(sizes: Sizes, dtype: Any, _: Any, *refs: Any) -> None:
    k, v, begin_k, *tiles, dk, dv = refs
    tile = pl.program_id(2)
    at = tile * TILE
    for number, (q, begin_q, slope, lse, delta) in enumerate((tiles[:5], tiles[5:])):
        queries, do = _read(q), _read(slope)
        part = _own(queries, _read(k), begin_q[0], begin_k[0], at + number * TILE, at, dtype)
        part = part._replace(seen=part.seen & (tile + number < sizes.tiles))  # behind the last tile stands it again
        weights, slopes = _own_slopes(part, _read(v), do, lse[0, 0], delta[0, 0], dtype)
        grads = _ab(slopes, queries, dtype), _ab(weights, do, dtype)
        for ref, grad in zip((dk, dv), grads, strict=True):
            ref[0, 0] = grad if number == 0 else ref[0, 0] + grad


def _own_slopes(part: _Own, v: Array, do: Array, lse: Array, delta: Array, dtype: Any) -> tuple[Array, Array]:
    """Weights, and the scores' slopes."""
    weights = jnp.where(part.seen, jnp.exp(part.scores - lse), 0)
    return weights, weights * (_abt(v, do, dtype) - delta)


def _past_slopes(part: _Past, v: Array, do: Array, lse: Array, delta: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """Weights of values, and the slopes of landmarks' and of keys' scores."""
    p = jnp.where(part.seen, jnp.exp(part.logits - lse), 0)
    of_values = _abt(v, do, dtype).reshape(part.inside.shape)
    average = (part.inside * of_values).sum(axis=1)
    weights = part.inside * p[:, None]
    return _flat(weights), p * (average - delta), _flat(weights * (of_values - average[:, None]))


def _read(ref: Any) -> Array:
    return ref[0, 0].astype(jnp.float32)


class _Specs:
    """Blocks of a grid (row, head, x, y), given which of its indices are the tile and the group."""

    def __init__(self, sizes: Sizes, tile: int, group: int):
        self.sizes, self.tile, self.group = sizes, tile, group

    def queries(self, width: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, H, P, W]"""
        return pl.BlockSpec((1, 1, TILE, width), lambda *at: (at[0], at[1], self._tile(at, ahead), 0))

    def lanes(self, height: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, H, R, P], numbers per query along lanes."""
        return pl.BlockSpec((1, 1, height, TILE), lambda *at: (at[0], at[1], 0, self._tile(at, ahead)))

    def line(self, ahead: int = 0) -> pl.BlockSpec:
        """[B, 1, P]"""
        return pl.BlockSpec((1, 1, TILE), lambda *at: (at[0], 0, self._tile(at, ahead)))

    def keys(self, width: int, ahead: int = 0) -> pl.BlockSpec:
        """[B, G, P, W]"""
        share = self.sizes.share
        return pl.BlockSpec((1, 1, TILE, width), lambda *at: (at[0], at[1] // share, self._tile(at, ahead), 0))

    def column(self, ahead: int = 0) -> pl.BlockSpec:
        """[B, P, 1]"""
        return pl.BlockSpec((1, TILE, 1), lambda *at: (at[0], self._tile(at, ahead), 0))

    def blocks(self, count: int, width: int, shared: bool = True) -> pl.BlockSpec:
        """[B, G, N * count, W], or [B, H, N * count, W]"""
        share = self.sizes.share if shared else 1
        return pl.BlockSpec((1, 1, count, width), lambda *at: (at[0], at[1] // share, at[self.group], 0))

    def block_column(self) -> pl.BlockSpec:
        """[B, M, 1]"""
        return pl.BlockSpec((1, self.sizes.blocks, 1), lambda *at: (at[0], at[self.group], 0))

    def _tile(self, at: tuple, ahead: int) -> Any:
        return jnp.clip(at[self.tile] + ahead, 0, self.sizes.tiles - 1)


def _call(
    name: str, kernel: Any, sizes: Sizes, grid: tuple[int, ...], first: Array, given: Any, made: Any, scratch: Any = ()
) -> Any:
    """Run a kernel; given: (array, spec) pairs, made: (shape, spec) pairs."""
    arrays, in_specs = zip(*given, strict=True)
    shapes, out_specs = zip(*made, strict=True)
    return pl.pallas_call(
        functools.partial(kernel, sizes, arrays[0].dtype),
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
        interpret=INTERPRETER if sizes.interpret else False,
        name=name,
    )(first, *arrays)


def _tiles_first(q: Array, k: Array, v: Array, marks: Array, kb: Array, vb: Array, where: Where, specs: _Specs) -> list:
    """What forward and dQ read."""
    width, values, keys = q.shape[-1], v.shape[-1], specs.sizes.blocks * specs.sizes.length
    return [
        (q, specs.queries(width)),
        (k, specs.keys(width, -1)),
        (k, specs.keys(width)),
        (v, specs.keys(values, -1)),
        (v, specs.keys(values)),
        (where.begin_q, specs.line()),
        (where.document_q, specs.line()),
        (where.begin_k, specs.column(-1)),
        (where.begin_k, specs.column()),
        (marks, specs.blocks(specs.sizes.blocks, width)),
        (kb, specs.blocks(keys, width)),
        (vb, specs.blocks(keys, values)),
        (where.document_b, specs.block_column()),
        (where.time_b, specs.block_column()),
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(
    q: Array, k: Array, v: Array, marks: Array, kb: Array, vb: Array, where: Where, sizes: Sizes
) -> Float[Array, "B H P V"]:
    return _forward(q, k, v, marks, kb, vb, where, sizes)[0]


def _forward(
    q: Array, k: Array, v: Array, marks: Array, kb: Array, vb: Array, where: Where, sizes: Sizes
) -> tuple[Float[Array, "B H P V"], tuple]:
    specs, values, length = _Specs(sizes, 2, 3), v.shape[-1], q.shape[2]
    given = _tiles_first(q, k, v, marks, kb, vb, where, specs)
    made = (
        (shaped(sizes.rows, sizes.heads, values, length, dtype=v.dtype), specs.lanes(values)),
        (shaped(sizes.rows, sizes.heads, 1, length), specs.lanes(1)),
    )
    grid = (sizes.rows, sizes.heads, sizes.tiles, sizes.groups)
    scratch = ((1, TILE), (1, TILE), (values, TILE))
    out, lse = _call("landmark_attention_fwd", _forward_kernel, sizes, grid, where.first, given, made, scratch)
    out = jnp.swapaxes(out, 2, 3)
    return out, (q, k, v, marks, kb, vb, where, out, lse)


def _backward(sizes: Sizes, saved: tuple, slope: Float[Array, "B H P V"]) -> tuple:
    q, k, v, marks, kb, vb, where, out, lse = saved
    width, values, length = q.shape[-1], v.shape[-1], q.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1)[:, :, None]
    rows, heads, keys = sizes.rows, sizes.heads, sizes.blocks * sizes.length

    specs = _Specs(sizes, 2, 3)
    given = _tiles_first(q, k, v, marks, kb, vb, where, specs)
    given += [(slope, specs.queries(values)), (lse, specs.lanes(1)), (delta, specs.lanes(1))]
    made = ((shaped(rows, heads, width, length), specs.lanes(width)),)
    grid = (rows, heads, sizes.tiles, sizes.groups)
    (dq,) = _call("landmark_attention_dq", _dq_kernel, sizes, grid, where.first, given, made)

    specs = _Specs(sizes, 3, 2)
    given = [
        (q, specs.queries(width)),
        (where.document_q, specs.line()),
        (marks, specs.blocks(sizes.blocks, width)),
        (kb, specs.blocks(keys, width)),
        (vb, specs.blocks(keys, values)),
        (where.document_b, specs.block_column()),
        (where.time_b, specs.block_column()),
        (slope, specs.queries(values)),
        (lse, specs.lanes(1)),
        (delta, specs.lanes(1)),
    ]
    counts = (sizes.blocks, width), (keys, width), (keys, values)
    made = tuple((shaped(rows, heads, sizes.groups * n, w), specs.blocks(n, w, shared=False)) for n, w in counts)
    grid = (rows, heads, sizes.groups, sizes.tiles)
    of_blocks = _call("landmark_attention_dkv_past", _past_kernel, sizes, grid, where.first, given, made)

    specs = _Specs(sizes, 2, 2)
    given = [(k, specs.keys(width)), (v, specs.keys(values)), (where.begin_k, specs.column())]
    for ahead in (0, 1):
        given += [(q, specs.queries(width, ahead)), (where.begin_q, specs.line(ahead))]
        given += [(slope, specs.queries(values, ahead)), (lse, specs.lanes(1, ahead)), (delta, specs.lanes(1, ahead))]
    made = tuple((shaped(rows, heads, length, w), specs.queries(w)) for w in (width, values))
    grid = (rows, heads, sizes.tiles)
    of_tokens = _call("landmark_attention_dkv_own", _own_kernel, sizes, grid, where.first, given, made)

    def like(x: Array, grad: Array) -> Array:
        """Summed over the query heads that share a key/value head."""
        return per_group(grad, x.shape[1]).astype(x.dtype)

    shared = (like(x, grad) for x, grad in zip((k, v, marks, kb, vb), (*of_tokens, *of_blocks), strict=True))
    return jnp.swapaxes(dq, 2, 3).astype(q.dtype), *shared, None


_attend.defvjp(_forward, _backward)
