"""BASED on Hopper: numerators and denominators in one pass, features built on the tensor cores.

With a column of ones beside the keys and queries, s' = 1 + q.k is one product, and the kernel of a pair is
f = 1 + s + s^2/2 = (1 + s'^2)/2. Features (`mosaic_gpu_features.py`) never leave the registers, for queries as the left
operand of phi(q) S, for keys, transposed, of S + phi(k)^T v. The state is 3 x 64 features of which the first 153 are
used; it and the denominators' z are carried in float32. `mosaic_gpu_gradients.py` has the gradients.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.linear_attention.gates import Gates, gates_of
from recallax.pallas_kernels.linear_attention.segments import (
    How,
    cut,
    cut_gates,
    join,
    join_last,
    number_of_segments,
)
from recallax.pallas_kernels.mosaic_gpu import (
    CHUNK,
    COLUMNS,
    MATRIX,
    ROWS,
    accumulate,
    along_columns,
    along_rows,
    decayed_rows,
    launch,
    matrix,
    pipelined,
    unknown_zero,
    write,
    zeros,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu_features import (
    COLUMN,
    KEYS,
    QUERIES,
    TILE,
    TILES,
    VALUES,
    WIDTH,
    features,
    picks,
    tile,
)
from recallax.pallas_kernels.taylor_attention.mosaic_gpu_features import scales as feature_scales
from recallax.pallas_kernels.taylor_attention.mosaic_gpu_gradients import Inputs, gradients, segment_starts


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    docs: Documents | None,
    features_of: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The op's form for Hopper: bfloat16, 16 channels of keys, 64 of values beside the ones, symmetric features."""
    interpret = interpreting("gpu")
    if features_of is not feature_maps.taylor:
        raise Unsupported("features is not the symmetric expansion, which it must be")
    for name, size, wanted in (("K", q.shape[3], WIDTH), ("V", v.shape[3] - 1, VALUES)):
        if size != wanted:
            raise Unsupported(f"{name} is {size}; it must be {wanted}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    if state is None:
        width = 1 + WIDTH + WIDTH * (WIDTH + 1) // 2
        state = jnp.zeros((v.shape[0], v.shape[2], width, v.shape[3]), jnp.float32)
    length = q.shape[1]
    segments = number_of_segments(v.shape[0] * v.shape[2], -(-length // CHUNK))
    extra = -length % (CHUNK * segments)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    if docs is not None:
        docs = Documents(jnp.pad(docs.index, ((0, 0), (0, extra)), mode="edge"), padded(docs.valid))
    ones = jnp.ones_like(q[..., :1])
    room = jnp.zeros((*q.shape[:3], COLUMN - WIDTH - 1), q.dtype)
    # What is padded has no ones either, so that all its features are 0.
    q, k = (padded(jnp.concatenate([x, ones, room], axis=3)) for x in (q, k))
    gates = gates_of(None, docs, 1, CHUNK)
    scales = feature_scales()[None, None, :, None]
    filled = jnp.pad(state * scales, ((0, 0), (0, 0), (0, TILES * TILE - state.shape[2]), (0, 0)))
    inputs = Inputs(q, k, padded(v[..., :-1]), filled[..., :-1], filled[..., -1])
    out, total, final, final_total = _attend(How(1.0, segments, interpret), inputs, gates)
    final = jnp.concatenate([final, final_total[..., None]], axis=3)[:, :, : state.shape[2]] / scales
    total = jnp.moveaxis(total, 1, 2)[..., None].astype(v.dtype)
    return jnp.concatenate([out, total], axis=3)[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, inputs: Inputs, gates: Gates | None):
    """Numerators in v's dtype, denominators [B, H, T], the final state and its sums in float32."""
    n, (q, k, v, state, totals) = how.segments, inputs
    ones = jnp.ones((v.shape[0], v.shape[2], v.shape[1]), jnp.float32)
    first = segment_starts(k, v, ones, gates, state, totals, n, reverse=False, interpret=how.interpret)
    q, k, v = (cut(x, n) for x in (q, k, v))
    out, total, final, final_total = _forward(q, k, v, cut_gates(gates, n), *first, how.interpret)
    return join(out, n), join_last(total, n), final[n - 1 :: n], final_total[n - 1 :: n]


def _attend_fwd(how, inputs, gates):
    return _attend(how, inputs, gates), (inputs, gates)


def _attend_bwd(how, residuals, cotangents):
    (inputs, gates), (grad, *rest) = residuals, cotangents
    return gradients(inputs, gates, grad, *rest, segments=how.segments, interpret=how.interpret), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(q, k, v, gates, state, totals, interpret):
    b, t, h, _ = q.shape

    def forward(q, k, v, gates, picks, start, start_total, out, total, final, final_total):
        row, head = lax.axis_index("row"), lax.axis_index("head")

        def scoped(held, sums, picked, kept, staged, arrived):
            def context(pipeline):
                plgpu.copy_gmem_to_smem(picks, picked, arrived)
                plgpu.copy_gmem_to_smem(start_total.at[row, head], sums.at[0], arrived)
                plgpu.barrier_wait(arrived)
                states = pipeline(
                    [plgpu.load(start.at[row, head, tile(i)], layout=MATRIX, optimized=False) for i in range(TILES)]
                )
                for i in range(TILES):
                    final[row, head, tile(i)] = states[i]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(sums.at[0], final_total.at[row, head])
                plgpu.wait_smem_to_gmem(0)

            def chunk(index, q, k, v, *rest):
                *gates, states = rest
                zero = unknown_zero(index[0])
                room = held.at[zero], sums.at[zero], picked.at[zero], kept.at[zero] if gates else None
                time = pl.ds(index[0] * CHUNK, CHUNK)
                part, total[row, head, time] = _read(q, k, v, gates, states, room, interpret)
                write((staged.at[zero], part, out.at[row, time, head]))
                return _updated(k, v, gates, states, room, interpret)

            along = [gate.at[row, 0] for gate in gates]
            tokens = [x.at[row, :, head] for x in (q, k, v)]
            pipelined(chunk, tokens, along, context, 1, None, 1, order=lambda step: step)

        pl.run_scoped(
            scoped,
            matrix(1, TILES * TILE, VALUES, tile=64),
            plgpu.SMEM((1, TILES * TILE), jnp.float32),
            matrix(1, 3, TILES * TILE, COLUMN, tile=32),
            matrix(1, 2, CHUNK, COLUMN, tile=COLUMN),
            matrix(1, CHUNK, VALUES, tile=64),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="worker",
        )

    return launch(
        forward,
        out=(
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(totals.shape, jnp.float32),
        ),
        grid={"row": b, "head": h},
        workers=1,
        interpret=interpret,
    )(q, k, v, gates or (), picks()[None], state, totals)


def _read(q, k, v, gates, states, room, interpret):
    """One chunk's numerators and denominators.

    room: for the state as an operand, the features' sums, the matrices that pick columns, and, with documents, for the
    queries and keys that do not see the state before the chunk or are not in the one behind it as zeros.
    """
    square, dtype, (held, sums, picked, kept) = (CHUNK, CHUNK), v.dtype, room
    own = q
    if gates:
        rows, last = plgpu.load(gates[0], layout=ROWS), plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - plgpu.load(gates[1], layout=ROWS))
        for i, (x, factor) in enumerate(((q, jnp.exp2(rows)), (k, left))):
            kept.at[i][...] = decayed_rows(x, factor, interpret=interpret).astype(dtype)
        own = kept.at[0]
    for i in range(TILES):
        held.at[tile(i)][...] = states[i].astype(dtype)
    plgpu.commit_smem()
    out, totals = zeros(CHUNK, VALUES), []
    for i in range(TILES):
        phi = features(own, picked, i, QUERIES, interpret)
        seen_sums = phi * along_columns(plgpu.load(sums.at[tile(i)], layout=COLUMNS), square)
        totals.append(jnp.sum(seen_sums, axis=1))
        (out,) = accumulate((out, (phi.astype(dtype), held.at[tile(i)])), interpret=interpret)
    total = totals[0] + totals[1] + totals[2]
    (scores,) = accumulate((zeros(*square), (q, k.transpose((1, 0)))), interpret=interpret)
    scores = 0.5 + 0.5 * scores * scores
    query, key = (plgpu.broadcasted_iota(jnp.int32, square, axis, layout=MATRIX) for axis in (0, 1))
    seen = query >= key
    if gates:
        rows = plgpu.load(gates[0], layout=ROWS)
        gap = along_rows(rows, square) - along_columns(plgpu.load(gates[1], layout=COLUMNS), square)
        scores *= jnp.exp2(jnp.where(seen, gap, -jnp.inf))
    else:
        scores = jnp.where(seen, scores, 0.0)
    total += jnp.sum(scores, axis=1)
    (out,) = accumulate((out, (scores.astype(dtype), v)), interpret=interpret)
    return out.astype(dtype), total


def _updated(k, v, gates, states, room, interpret):
    """The state behind a chunk; the features' sums are replaced."""
    (_, sums, picked, kept), after = room, []
    k = kept.at[1] if gates else k
    for i, state in enumerate(states):
        phi = features(k, picked, i, KEYS, interpret, transposed=True)
        total = plgpu.load(sums.at[tile(i)], layout=ROWS)
        if gates:
            remaining = jnp.exp2(plgpu.load(gates[0].at[CHUNK - 1]))
            state, total = state * remaining, total * remaining
        sums.at[tile(i)][...] = total + jnp.sum(phi, axis=1)
        (state,) = accumulate((state, (phi.astype(v.dtype), v)), interpret=interpret)
        after.append(state)
    return after
