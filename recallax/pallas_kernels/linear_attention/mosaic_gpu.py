"""Linear attention on Hopper: one pass over time per head, with the state on chip.

A block of threads owns one value head of one row. It walks over chunks of 64 tokens that TMA brings in ahead of it and
carries the float32 state in registers; nothing but inputs and outputs touches the device's memory. With L the
cumulative log2-decay of a chunk, in the notation of `xla.py`,

    o_i = 2^L_i S^T q_i + sum_{j<=i} 2^(L_i - L_j) (q_i.k_j) v_j        S <- 2^L_C S + sum_j k_j (2^(L_C - L_j) v_j)^T

A new document is a gate that forgets everything (`RESTART`), and padding is a key whose gate is so high that nothing is
left of it (`PADDING`): the kernel knows neither. Operands of products are bfloat16, sums and the state float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
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
    load,
    matrix,
    pipelined,
    rounded,
    rows_and_columns,
    write,
    zeros,
)

WIDTHS = (64, 128)
"""Of keys and of values: what a warpgroup's registers and the tensor cores' tiles are made for."""
LOWEST = -150.0
"""Log2-decay of a token at least: 2^-150 is 0 in float32, and differences of cumulative sums keep their digits."""
RESTART = -200.0
"""Log2-decay where a document starts."""
PADDING = 1e9
"""Cumulative log2-decay of a key that is padding."""
LOG2E = 1.4426950408889634


class Gates(NamedTuple):
    """Log2-decay from the chunk's start to each token, its own included, as queries and as keys see it."""

    query: Float[Array, "B H T"]
    key: Float[Array, "B H T"]


class _Inputs(NamedTuple):
    """T is a multiple of the chunk, and the decay is a log2."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    decay: Float[Array, "B T H"] | None
    state: Float[Array, "B H K V"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H K V"] | None,
    docs: Documents | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for Hopper: bfloat16, K and V of 64 or 128, at most one decay per token (W = 1)."""
    interpret = interpreting("gpu")
    width, values, length = q.shape[3], v.shape[3], q.shape[1]
    for name, size in (("K", width), ("V", values)):
        if size not in WIDTHS:
            raise Unsupported(f"{name} is {size}; it must be one of {WIDTHS}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    if log_decay is not None and log_decay.shape[3] > 1:
        raise Unsupported(f"log_decay has {log_decay.shape[3]} channels; it must be one decay per token")
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], width, values), jnp.float32)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, -length % CHUNK)) + ((0, 0),) * (x.ndim - 2))

    decay = None if log_decay is None else jnp.maximum(log_decay[..., 0].astype(jnp.float32) * LOG2E, LOWEST)
    if docs is not None:
        docs = Documents(jnp.pad(docs.index, ((0, 0), (0, -length % CHUNK)), mode="edge"), padded(docs.valid))
    inputs = _Inputs(*(None if x is None else padded(x) for x in (q, k, v, decay)), state)
    out, final = _attend(scale, interpret, inputs, docs)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, interpret: bool, inputs: _Inputs, docs: Documents | None):
    return _attend_fwd(scale, interpret, inputs, docs)[0]


def _attend_fwd(scale, interpret, inputs, docs):
    q, k, v, decay, state = inputs
    out, final = _forward(q, k, v, _gates(decay, docs, v.shape[2]), state, scale, interpret)
    return (out, final), (inputs, docs)


def _attend_bwd(scale, interpret, kept, cotangents):
    inputs, docs = kept
    q, k, v, decay, state = inputs
    gates = _gates(decay, docs, v.shape[2])
    dq, dk, dv, dstate, kept_sums = _backward(
        q, k, v, gates, state, *cotangents, scale, interpret, gated=decay is not None
    )
    dq, dk = (jnp.sum(x.reshape(*q.shape[:3], -1, q.shape[3]), 3, jnp.float32).astype(q.dtype) for x in (dq, dk))
    slope = None
    if decay is not None:
        final, *sums = kept_sums
        slope = _decay_slope(*sums, jnp.sum(jnp.swapaxes(final, 2, 3) * cotangents[1], axis=(2, 3)), docs)
    return _Inputs(dq, dk, dv, slope, dstate), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _gates(decay: Float[Array, "B T H"] | None, docs: Documents | None, heads: int) -> Gates | None:
    """The gates of every head; None where nothing decays and no document ends."""
    if decay is None and docs is None:
        return None
    if docs is not None:
        decay = jnp.zeros((*docs.valid.shape, heads), jnp.float32) if decay is None else decay
        decay = jnp.where(_restarts(docs)[..., None], RESTART, jnp.where(docs.valid[..., None], decay, 0.0))
    assert decay is not None
    chunks = jnp.moveaxis(decay, 2, 1).reshape(decay.shape[0], heads, -1, CHUNK)
    query = jnp.cumsum(chunks, axis=-1).reshape(*chunks.shape[:2], -1)
    return Gates(query, query if docs is None else jnp.where(docs.valid[:, None], query, PADDING))


def _restarts(docs: Documents) -> Bool[Array, "B T"]:
    """Where documents start, other than the one that the incoming state belongs to."""
    return jnp.diff(docs.index, axis=1, prepend=0) > 0


def _decay_slope(
    queries: Float[Array, "B H N T"], keys: Float[Array, "B H N T"], at_end: Float[Array, "B H"], docs: Documents | None
) -> Float[Array, "B T H"]:
    """The gradient of the log2-decay from the sums of q.dq and of k.dk of each token, in N parts.

    A token's decay weighs every pair of an earlier key and a query that is the token's own or later, so its gradient
    is what later queries see less what later keys are seen, up to the document's end, and the final state's part.
    """
    through = jnp.sum(queries - keys, axis=2).at[:, :, -1].add(at_end)
    if docs is None:
        slopes = lax.cumsum(through, axis=2, reverse=True)
    else:
        restarts = _restarts(docs)[:, None]

        def join(later, earlier):
            return jnp.where(earlier[1], earlier[0], earlier[0] + later[0]), earlier[1] | later[1]

        ends = jnp.concatenate([restarts[:, :, 1:], jnp.zeros_like(restarts[:, :, :1])], axis=2)
        ends = jnp.broadcast_to(ends, through.shape)
        slopes, _ = lax.associative_scan(join, (through, ends), axis=2, reverse=True)
        slopes = jnp.where(restarts | ~docs.valid[:, None], 0.0, slopes)
    return jnp.moveaxis(slopes, 1, 2) / LOG2E


class _Walk(NamedTuple):
    """Sizes of one head's walk over time."""

    tokens: int
    width: int
    values: int
    scale: float
    interpret: bool

    @property
    def workers(self) -> int:
        """Computing warpgroups: the state and each product's result are divided among them by columns."""
        return min(self.width, self.values) // 64

    @property
    def worker(self) -> jax.Array | int:
        """Which of them this is."""
        return lax.axis_index("worker")

    def swapped(self) -> "_Walk":
        """With the widths of keys and values exchanged."""
        return self._replace(width=self.values, values=self.width)


def _forward(q, k, v, gates, state, scale, interpret):
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = _Walk(t, width, values, scale, interpret)

    def kernel(q, k, v, gates, start, out, final):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        tokens = q.at[row, :, group], k.at[row, :, group], v.at[row, :, head]
        gates = [gate.at[row, head] for gate in gates]
        _ascend(sizes, tokens, gates, start.at[row, head], out.at[row, :, head], final=final.at[row, head])

    return launch(
        kernel,
        out=(jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        grid={"row": b, "head": h},
        workers=sizes.workers,
        interpret=interpret,
    )(q, k, v, gates or (), state)


def _backward(q, k, v, gates, state, grad, state_grad, scale, interpret, *, gated):
    """Gradients of q and k per value head, of v and the state; if `gated` what the decay's gradient needs.

    That is the final state transposed and the sums of q.dq and k.dk per token, of each warpgroup's columns. A pair of
    tokens is in both sums and in every gradient between them only as their difference, so the two walks must see one
    rounding: decays are rounded into the keys of the forward walk and into the queries of the other, the sums are of
    those, pairs within a chunk are float32 in both, and a state's lower digits are multiplied too.
    """
    (b, t, groups, width), (h, values) = q.shape, v.shape[2:]
    sizes = _Walk(t, width, values, scale, interpret)

    def kernel(q, k, v, gates, start, grad, state_grad, dq, dk, dv, dstart, kept):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        group = lax.div(head, jnp.int32(h // groups))
        q, k, v, grad = q.at[row, :, group], k.at[row, :, group], v.at[row, :, head], grad.at[row, :, head]
        gates = [gate.at[row, head] for gate in gates]
        dq, dk, dv = (x.at[row, :, head] for x in (dq, dk, dv))
        end, *sums = kept if gated else (None, None, None)
        query_sums, key_sums = (x.at[row, head] if gated else None for x in sums)

        @pl.when(lax.axis_index("walk") == 0)
        def _():
            tokens = (grad, v, k, q) if gated else (grad, v, k)
            final = end.at[row, head] if gated else None
            _ascend(sizes.swapped(), tokens, gates, start.at[row, head], dq, final=final, sums=query_sums)

        @pl.when(lax.axis_index("walk") == 1)
        def _():
            _descend(sizes, (q, k, v, grad), gates, state_grad.at[row, head], dk, dv, dstart.at[row, head], key_sums)

    per_head = jax.ShapeDtypeStruct((b, t, h, width), q.dtype)
    sums = jax.ShapeDtypeStruct((b, h, sizes.workers, t), jnp.float32)
    return launch(
        kernel,
        out=(
            per_head,
            per_head,
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            (jax.ShapeDtypeStruct((b, h, values, width), jnp.float32), sums, sums) if gated else (),
        ),
        grid={"row": b, "head": h, "walk": 2},
        workers=sizes.workers,
        interpret=interpret,
    )(q, k, v, gates or (), jnp.swapaxes(state, 2, 3), grad, state_grad)


def _ascend(sizes, tokens, gates, start, out, *, final=None, sums=None):
    """One head forward in time.

    tokens: q, k and v as [T, width] each in global memory. With `sums` also x, as wide as v: the sums over columns of
    x times what the output owes to the state are written there, [workers, T] in float32, those of x times the rest
    too: what the decay's gradient needs.
    """
    workers, worker = sizes.workers, sizes.worker
    own = sizes.values // workers
    columns = pl.ds(worker * own, own)

    def scoped(held, low, decayed, staged):
        held, decayed, staged = (x.at[worker] for x in (held, decayed, staged))
        low = low.at[worker] if sums is not None else None

        def context(pipeline):
            state = pipeline(plgpu.load(start.at[:, columns], layout=MATRIX, optimized=False))
            if final is not None:
                final[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def chunk(index, *refs):
            q, k, v, *x = refs[: len(tokens)]
            v, x = v.at[:, columns], x[0].at[:, columns] if x else None
            *gates, state = refs[len(tokens) :]
            part, part_sums, state = _ascend_chunk(sizes, q, k, v, x, gates, state, held, low, decayed)
            time = pl.ds(index[0] * CHUNK, CHUNK)
            if sums is not None:
                sums[worker, time] = part_sums
            write((staged, part, out.at[time, columns]))
            return state

        ahead = 3 if sums is None and sizes.width + sizes.values == 2 * WIDTHS[0] else 1
        pipelined(chunk, tokens, gates, context, workers, ahead, order=lambda step: step)

    state = matrix(workers, sizes.width, own)
    part = matrix(workers, CHUNK, own)
    pl.run_scoped(scoped, state, state if sums is not None else None, part, part, collective_axes="worker")


def _ascend_chunk(sizes, q, k, v, x, gates, state, held, low, decayed):
    """One chunk's output, its sums with x, and the state behind it.

    held: room for the state as an operand, low: for the digits that it loses so; decayed: for the values as they
    reach the chunk's end.
    """
    square, shape, dtype, interpret = (CHUNK, CHUNK), v.shape, v.dtype, sizes.interpret
    held[...] = state.astype(dtype)
    if gates:
        rows, last = plgpu.load(gates[0], layout=ROWS), plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - plgpu.load(gates[1], layout=ROWS))
        decayed[...] = decayed_rows(v, left, interpret=interpret).astype(dtype)
    else:
        decayed = v
    if x is not None:
        low[...] = (state - rounded(state, dtype, interpret)).astype(dtype)
    plgpu.commit_smem()
    query, key = rows_and_columns(square)
    seen = query >= key

    def decayed_scores(scores):
        if not gates:
            return jnp.where(seen, scores, 0.0)
        gap = along_rows(rows, square) - along_columns(plgpu.load(gates[1], layout=COLUMNS), square)
        return scores * jnp.exp2(jnp.where(seen, gap, -jnp.inf))

    scores, out = (zeros(*square), (q, k.transpose((1, 0)))), (zeros(*shape), (q, held))
    sums = None
    if x is None:
        scores, out = accumulate(scores, out, interpret=interpret)
        scores = decayed_scores(scores).astype(dtype)
    else:  # in two steps, or registers run out
        scores, others = accumulate(scores, (zeros(*square), (x, v.transpose((1, 0)))), interpret=interpret)
        scores = decayed_scores(scores)
        sums = jnp.sum(scores * others, axis=1) * sizes.scale
        scores = scores.astype(dtype)
        (out,) = accumulate((*out, (q, low)), interpret=interpret)
        seen_by = decayed_rows(x, jnp.exp2(rows), interpret=interpret, scale=sizes.scale)
        sums += jnp.sum(out * seen_by, axis=1)
    if gates:
        out *= along_rows(jnp.exp2(rows), shape)
        state *= jnp.exp2(last)
    out, state = accumulate((out, (scores, v)), (state, (k.transpose((1, 0)), decayed)), interpret=interpret)
    return (out * sizes.scale).astype(dtype), sums, state


def _descend(sizes, tokens, gates, start, dk, dv, final, sums):
    """One head backward in time: the gradients of k, v and the state, given the final state's.

    tokens: q, k, v and the output's gradient, [T, width] each in global memory. sums: where to write the sums over
    columns of k times its gradient, [workers, T], or None. Each warpgroup owns columns of dv and of the state's
    gradient, and columns of dk.
    """
    workers, worker = sizes.workers, sizes.worker
    keys, own = sizes.width // workers, sizes.values // workers
    key_columns, columns = pl.ds(worker * keys, keys), pl.ds(worker * own, own)

    def scoped(held, low, decayed, staged, published):
        if staged is None:  # shared memory is short: where the state's lower digits were
            staged_k, staged_v = (low.at[worker, pl.ds(i * CHUNK, CHUNK)] for i in range(2))
        else:
            staged_k, staged_v = (x.at[worker] for x in staged)

        def context(pipeline):
            state = pipeline(plgpu.load(start.at[:, columns], layout=MATRIX, optimized=False))
            final[:, columns] = state
            plgpu.wait_smem_to_gmem(0)

        def meet():
            if workers > 1:
                plgpu.barrier_arrive(published)
                plgpu.barrier_wait(published)

        def chunk(index, q, k, v, grad, *rest):
            *gates, state = rest
            dk_part, dv_part, part_sums, state = _descend_chunk(
                sizes, q, k, v, grad, gates, state, held, low, decayed, meet
            )
            time = pl.ds((last - index[0]) * CHUNK, CHUNK)
            if sums is not None:
                sums[worker, time] = part_sums
            write((staged_k, dk_part, dk.at[time, key_columns]), (staged_v, dv_part, dv.at[time, columns]))
            return state

        last = sizes.tokens // CHUNK - 1
        pipelined(chunk, tokens, gates, context, workers, 1, order=lambda step: last - step)

    state = matrix(workers, sizes.width, own)
    staged = (matrix(workers, CHUNK, keys), matrix(workers, CHUNK, own)) if sums is None or workers == 1 else None
    pl.run_scoped(
        scoped,
        state,
        state if sums is not None else None,
        matrix(CHUNK, sizes.width),
        staged,
        plgpu.Barrier(num_arrivals=workers),
        collective_axes="worker",
    )


def _descend_chunk(sizes, q, k, v, grad, gates, state, held, low, decayed, meet):
    """One chunk's gradients of k and v, the sums for the gates, and the gradient of the state before it.

    Matrices of pairs have keys along the rows and queries along the columns. held, low: room for the state's gradient
    as an operand, of all warpgroups; decayed: for the queries as they reach the chunk's start; `meet` makes the
    warpgroups wait for each other.
    """
    square, interpret, workers, worker = (CHUNK, CHUNK), sizes.interpret, sizes.workers, sizes.worker
    keys, own = sizes.width // workers, sizes.values // workers
    key_columns, columns = pl.ds(worker * keys, keys), pl.ds(worker * own, own)
    dtype = v.dtype
    scores, slopes = accumulate(
        (zeros(*square), (k, q.transpose((1, 0)))), (zeros(*square), (v, grad.transpose((1, 0)))), interpret=interpret
    )
    key, query = rows_and_columns(square)
    seen = key <= query
    sums = None
    if gates:
        rows = plgpu.load(gates[1], layout=ROWS)
        gap = along_columns(plgpu.load(gates[0], layout=COLUMNS), square) - along_rows(rows, square)
        decay = jnp.exp2(jnp.where(seen, gap, -jnp.inf)) * sizes.scale
        scores *= decay
        if low is not None:
            sums = jnp.sum(scores * slopes, axis=1) * (1 / workers)
        slopes *= decay
        since = jnp.exp2(plgpu.load(gates[0], layout=ROWS))
        arriving = decayed_rows(q.at[:, key_columns], since, interpret=interpret, scale=sizes.scale)
    else:
        # Not a product with a mask of 0 and 1: the compiler would keep that in registers from chunk to chunk.
        scores, slopes = (jnp.where(seen, x * sizes.scale, 0.0) for x in (scores, slopes))
        arriving = load(q.at[:, key_columns]) * sizes.scale
    scores, slopes = scores.astype(dtype), slopes.astype(dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    held.at[worker][...] = state.astype(dtype)
    if low is not None:
        low.at[worker][...] = (state - rounded(state, dtype, interpret)).astype(dtype)
    decayed.at[:, key_columns][...] = arriving.astype(dtype)
    plgpu.commit_smem()
    meet()
    states = [held] if low is None else [held, low]
    blocks = [(i, pl.ds(i * own, own)) for i in range(workers)]
    before = (
        [(k, held.at[worker])],
        [(v.at[:, block], x.at[i, key_columns].transpose((1, 0))) for x in states for i, block in blocks],
    )
    dv, dk = zeros(CHUNK, own), zeros(CHUNK, keys)
    if gates:
        dv, dk = accumulate((dv, *before[0]), (dk, *before[1]), interpret=interpret)
        before = (), ()
        last = plgpu.load(gates[0].at[CHUNK - 1])
        left = jnp.exp2(last - rows)
        if low is not None:
            sums += jnp.sum(dk * decayed_rows(k.at[:, key_columns], left, interpret=interpret), axis=1)
        dv *= along_rows(left, dv.shape)
        dk *= along_rows(left, dk.shape)
        state *= jnp.exp2(last)
    dv, dk, state = accumulate(
        (dv, *before[0], (scores, grad.at[:, columns])),
        (dk, *before[1], (slopes, q.at[:, key_columns])),
        (state, (decayed.transpose((1, 0)), grad.at[:, columns])),
        interpret=interpret,
    )
    meet()  # before any of them overwrites what the others read
    return dk.astype(dtype), dv.astype(dtype), sums, state
