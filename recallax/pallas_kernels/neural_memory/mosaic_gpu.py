"""The linear memory with a gradient per token on Hopper: the delta rule's route, with weights and momentum as states.

    U = T (V - a_0 K W - a_1 K S),   T = (I + G- * K K^T)^{-1}          minus the slopes of `xla.py`'s exact chunks

What tokens weigh gradients and states with (G, a, b, c) is a matter of gates and documents alone and comes first, in
XLA (`inner.weigh`), as does what the initial weights add (`exact.py`). Then all chunks' scores and inverses, then a
walk over time that carries both states (`mosaic_gpu_walks.py`). For the gradients that walk also keeps U and the
states before each chunk, a walk backward leaves those of V and of the states behind each chunk, and then every chunk is
for itself (`mosaic_gpu_gradients.py`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import Documents, masks_of
from recallax.pallas_kernels.delta_rule.walks import OWN, Walk
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.mosaic_gpu import CHUNK, MATRIX, accumulate, launch, matrix, send, vector, zeros
from recallax.pallas_kernels.mosaic_gpu_solve import inverse_rooms, left_inverse
from recallax.pallas_kernels.neural_memory.exact import before_tokens, require_exact, without_origin
from recallax.pallas_kernels.neural_memory.inner import Fixed, Memory, Tokens, filled, weigh
from recallax.pallas_kernels.neural_memory.learner import Learner
from recallax.pallas_kernels.neural_memory.mosaic_gpu_gradients import Vectors, Weights, chunk_gradients
from recallax.pallas_kernels.neural_memory.mosaic_gpu_walks import Kept, ascend, descend

WIDTHS = (64, 128)
"""Of keys and values: what a warpgroup's registers and the tensor cores' tiles are made for."""

type States = tuple[Float[Array, "B H K V"], ...]


class _Inputs(NamedTuple):
    """T is a multiple of the chunk."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    weights: Weights
    states: States


def neural_memory(
    learner: Learner, fixed: Fixed, tokens: Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "B M H D"], Memory]:
    """The op's form for Hopper: bfloat16, 64 or 128 wide."""
    require_exact(learner, fixed)
    interpret = interpreting("gpu")
    if tokens.q.shape[3] not in WIDTHS:
        raise Unsupported(f"the memory is {tokens.q.shape[3]} wide; it must be one of {WIDTHS}")
    for name, x in zip("qkv", tokens[:3], strict=True):
        if x.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} is {x.dtype}; it must be bfloat16")
    (name,), length = memory.change, tokens.q.shape[1]
    tokens, docs = filled(tokens, docs, CHUNK)
    q, k, v = tokens[:3]
    keep = jnp.where(docs.valid[..., None, None], tokens.log_keep.astype(jnp.float32), 0)
    starts = docs.index != jnp.pad(docs.index[:, :-1], ((0, 0), (1, 0)))
    v, read, left = without_origin(learner, fixed.weights[name].astype(jnp.float32), q, k, v, keep, starts)
    states = (memory.change[name], *memory.momentum.values())
    weights = jax.checkpoint(functools.partial(_weights, learner))(tokens, docs)
    out, after = _learn(interpret, _Inputs(q, k, v, weights, states))
    momentum = {name: after[1]} if learner.momentum else {}
    return (out.astype(jnp.float32) + read).astype(q.dtype)[:, :length], Memory({name: after[0] + left}, momentum)


def _weights(learner: Learner, tokens: Tokens, docs: Documents) -> Weights:
    b, t, h, _ = tokens.lr.shape
    tokens, parts = jax.tree.map(lambda x: x.reshape(-1, CHUNK, *x.shape[2:]), (tokens, docs))
    previous = jnp.pad(docs.index[:, CHUNK - 1 : -1 : CHUNK], ((0, 0), (1, 0)))
    masks = masks_of(parts, previous.reshape(-1))
    weighing = jax.tree.map(lambda x: x[:, :, 0], weigh(learner, tokens, masks.visible))
    beta, f, before = before_tokens(learner, tokens, weighing, masks.visible)
    own, states = masks.own[:, None].astype(jnp.float32), 2 if learner.momentum else 1

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, -1, *x.shape[1:]), 1, 2).reshape(b, h, t, *x.shape[3:])

    def vectors(*some: Array) -> Vectors:
        return tuple(joined(x) for x in some[:states])

    return Weights(
        joined(weighing.gradients),
        joined(before),
        vectors(own * beta, own * f),
        vectors(own * weighing.carried, own * weighing.momentum),
        vectors(weighing.gradients[:, :, -1], weighing.last_gradients),
        vectors(weighing.last_momentum[..., None] * own) if learner.momentum else (),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learn(interpret: bool, inputs: _Inputs) -> tuple[Float[Array, "B T H V"], States]:
    scores, inverse = _scored(interpret, inputs)
    return _forward(interpret, inputs, scores, inverse, keep=False)[:2]


def _learn_fwd(interpret, inputs):
    scores, inverse = _scored(interpret, inputs)
    out, after, kept = _forward(interpret, inputs, scores, inverse, keep=True)
    return (out, after), (inputs, (scores, inverse), kept)


def _learn_bwd(interpret, residuals, cotangents):
    (inputs, (scores, inverse), (new, states)), (grad, late) = residuals, cotangents
    q, k, _, weights, _ = inputs
    slope, slopes, first = _backward(interpret, inputs, scores, inverse, grad, late)
    values = grad, new, slope
    dq, dk, weights = chunk_gradients(q, k, values, (states, slopes), weights, interpret=interpret)
    return (_Inputs(dq, dk, slope, weights, first),)


_learn.defvjp(_learn_fwd, _learn_bwd)


def _scored(interpret: bool, inputs: _Inputs) -> tuple[Float[Array, "B H T C"], Float[Array, "B H T D"]]:
    """P and T of all chunks, T as in `mosaic_gpu_solve.py`."""
    (b, t, h, width), dtype = inputs.q.shape, inputs.q.dtype

    def score(q, k, now, before, scores, inverse):
        row, head, time = lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("chunk") * CHUNK, CHUNK)

        def scoped(queries, keys, staged, rooms, arrived):
            plgpu.copy_gmem_to_smem(q.at[row, time, head], queries, arrived)
            plgpu.copy_gmem_to_smem(k.at[row, time, head], keys, arrived)
            plgpu.barrier_wait(arrived)
            (alike,) = accumulate((zeros(CHUNK, CHUNK), (queries, keys.transpose((1, 0)))), interpret=interpret)
            staged[...] = (alike * vector(now.at[row, head, time], MATRIX)).astype(dtype)
            (alike,) = accumulate((zeros(CHUNK, CHUNK), (keys, keys.transpose((1, 0)))), interpret=interpret)
            left_inverse(alike * vector(before.at[row, head, time], MATRIX), rooms, interpret)
            plgpu.commit_smem()
            send((staged, scores.at[row, head, time]), (rooms[0], inverse.at[row, head, time]))
            plgpu.wait_smem_to_gmem(0)

        tokens = [matrix(CHUNK, size, tile=64) for size in (width, width, CHUNK)]
        pl.run_scoped(scoped, *tokens, inverse_rooms(), plgpu.Barrier(num_arrivals=2))

    return launch(
        score,
        out=tuple(jax.ShapeDtypeStruct((b, h, t, n * CHUNK), dtype) for n in (1, 2)),
        grid={"row": b, "head": h, "chunk": t // CHUNK},
        workers=1,
        copiers=0,
        interpret=interpret,
    )(inputs.q, inputs.k, inputs.weights.now, inputs.weights.before)


def _forward(interpret, inputs, scores, inverse, *, keep):
    """The output, the final states and, if wanted, U and the states before the chunks."""
    q, k, v, weights, states = inputs
    b, t, h, values = v.shape
    sizes = Walk(t, q.shape[3], OWN, 1.0, interpret)

    def learn(q, k, v, scores, inverse, vectors, starts, out, finals, kept):
        row, head, columns = _place()
        tokens, along = _streams(q, k, v, scores, inverse, vectors)
        starts, finals = ([x.at[row, head, :, columns] for x in some] for some in (starts, finals))
        left = None
        if keep:
            left = Kept(kept[0].at[row, :, head, columns], [x.at[row, head, :, :, columns] for x in kept[1]])
        ascend(sizes, tokens, along, starts, out.at[row, :, head, columns], finals, left)

    chosen = jax.ShapeDtypeStruct(v.shape, v.dtype)
    return launch(
        learn,
        out=(chosen, _like(states), (chosen, _kept(states, t)) if keep else ()),
        grid={"row": b, "head": h, "part": values // OWN},
        workers=1,
        interpret=interpret,
    )(q, k, v, scores, inverse, weights.vectors(), states)


def _backward(interpret, inputs, scores, inverse, grad, late):
    """The gradients of V, of the states behind the chunks, and of the first states."""
    q, k, v, weights, _ = inputs
    b, t, h, values = v.shape
    sizes = Walk(t, q.shape[3], OWN, 1.0, interpret)

    def unlearn(q, k, grad, scores, inverse, vectors, ends, slope, slopes, first):
        row, head, columns = _place()
        tokens, along = _streams(q, k, grad, scores, inverse, vectors)
        ends, first = ([x.at[row, head, :, columns] for x in some] for some in (ends, first))
        kept = Kept(slope.at[row, :, head, columns], [x.at[row, head, :, :, columns] for x in slopes])
        descend(sizes, tokens, along, ends, first, kept)

    return launch(
        unlearn,
        out=(jax.ShapeDtypeStruct(v.shape, v.dtype), _kept(late, t), _like(late)),
        grid={"row": b, "head": h, "part": values // OWN},
        workers=1,
        interpret=interpret,
    )(q, k, grad, scores, inverse, weights.vectors(), late)


def _place():
    """Row, head and columns of the values of a block."""
    return lax.axis_index("row"), lax.axis_index("head"), pl.ds(lax.axis_index("part") * OWN, OWN)


def _streams(q, k, values, scores, inverse, vectors):
    """Of a block: what comes chunk by chunk, and the vectors along time."""
    row, head, columns = _place()
    tokens = [x.at[row, :, head] for x in (q, k)] + [values.at[row, :, head, columns]]
    return tokens + [x.at[row, head] for x in (scores, inverse)], [x.at[row, head] for x in vectors]


def _like(states):
    return tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in states)


def _kept(states, length):
    """States of all chunks."""
    return tuple(jax.ShapeDtypeStruct((*x.shape[:2], length // CHUNK, *x.shape[2:]), jnp.bfloat16) for x in states)
