"""The linear memory with a gradient per token on TPUs: `xla.py`'s exact chunks, with weights and momentum in VMEM.

    (I + G- * K K^T) U = beta- K W + f- K S - V          slopes of all tokens of a chunk, by one triangular system
    Y = beta Q W + f Q S - (G * Q K^T) U                 the minus sign: as the token before sees it

What the initial weights add is linear in them and stands outside (`exact.py`). The forward pass keeps the states at
each chunk's start; the backward pass walks the chunks in reverse and differentiates the same body.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels import mosaic_tpu_decay as decays
from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.mosaic_tpu import (
    Chunks,
    Matrices,
    Operand,
    Steps,
    Tokens,
    head_major,
    in_chunks,
    keeping,
    mm,
    mm_t,
    pulling,
    require_dtypes,
    shaped,
    steps_of,
    t_mm,
    time_major,
    walk,
)
from recallax.pallas_kernels.mosaic_tpu_solve import solve
from recallax.pallas_kernels.neural_memory import inner
from recallax.pallas_kernels.neural_memory.exact import require_exact, without_origin
from recallax.pallas_kernels.neural_memory.inner import Fixed, Memory
from recallax.pallas_kernels.neural_memory.learner import Learner

CHUNK = 64


def neural_memory(
    learner: Learner, fixed: Fixed, tokens: inner.Tokens, docs: Documents, memory: Memory
) -> tuple[Float[Array, "B M H D"], Memory]:
    """The op's form for TPUs, of float32 or bfloat16 queries, keys and values."""
    require_exact(learner, fixed)
    (name,), (q, k, v) = memory.change, tokens[:3]
    require_dtypes(q=q, k=k, v=v)
    length = q.shape[1]
    steps = steps_of(CHUNK, length, v, v.shape[2])
    lr = jnp.where(docs.valid[..., None, None], tokens.lr.astype(jnp.float32), 0)
    starts = docs.index != jnp.pad(docs.index[:, :-1], ((0, 0), (1, 0)))
    origin = fixed.weights[name].astype(jnp.float32)
    keep = jnp.where(docs.valid[..., None, None], tokens.log_keep.astype(jnp.float32), 0)
    seen = jnp.exp(keep) if learner.gradient == "token_decayed" else jnp.ones_like(keep)
    v, read, left = without_origin(learner, origin, q, k, v, keep, starts)

    def row(x: Float[Array, "B T H 1"]) -> Float[Array, "B H N 1 C"]:
        return in_chunks(head_major(x, steps)[..., 0], steps)[:, :, :, None]

    def rows(log: Float[Array, "B T H 1"]) -> Float[Array, "B H N 2 C"]:
        gate = decays.log_decay_of(log, docs, v.shape[2])
        assert gate is not None
        return decays.running(in_chunks(head_major(gate, steps)[..., 0], steps))

    moves = jnp.broadcast_to(docs.valid[..., None, None], keep.shape).astype(jnp.float32)
    kept = rows(tokens.log_keep)
    before = jnp.pad(kept[..., :-1], [(0, 0)] * 4 + [(1, 0)])
    inputs = _Inputs(
        *(head_major(x, steps) for x in (q, k, v)),
        lr=row(lr),
        seen=row(jnp.where(starts[..., None, None], 0, seen)),
        keep=jnp.concatenate([kept, before], axis=3),
        momentum=jnp.concatenate([rows(tokens.log_momentum), row(moves)], axis=3) if learner.momentum else None,
    )
    states = (memory.change[name], *memory.momentum.values())
    out, after = _core(steps, inputs, states)
    out = (time_major(out, length) + read).astype(tokens.q.dtype)
    momentum = {name: after[1]} if learner.momentum else {}
    return out, Memory({name: after[0] + left}, momentum)


class _Inputs(NamedTuple):
    """Of whole chunks, head-major."""

    q: Float[Array, "B H T I"]
    k: Float[Array, "B H T I"]
    v: Float[Array, "B H T O"]
    lr: Float[Array, "B H N 1 C"]
    seen: Float[Array, "B H N 1 C"]
    """How much of the weights after the token before a token's gradient sees: 0 where its document starts."""
    keep: Float[Array, "B H N 4 C"]
    """Running sums of the log of keep; and the same up to the token before."""
    momentum: Float[Array, "B H N 3 C"] | None
    """Running sums of its log; and 1 where the momentum moves the weights, 0 at padding."""

    def operands(self) -> list[Operand]:
        return [Chunks(x) if x.ndim == 5 else Tokens(x) for x in self if x is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(steps: Steps, inputs: _Inputs, states: Matrices) -> tuple[Float[Array, "B H T O"], Matrices]:
    body = functools.partial(_chunk, inputs.v.dtype)
    made = Tokens(shaped(*inputs.v.shape))
    after, (out,) = walk("neural_memory_forward", body, steps, states, inputs.operands(), (made,))
    return out, after


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    q: Float[Array, "C I"],
    k: Float[Array, "C I"],
    v: Float[Array, "C O"],
    lr: Float[Array, "1 C"],
    seen: Float[Array, "1 C"],
    keep: Float[Array, "4 C"],
    *momentum: Float[Array, "3 C"],
) -> tuple[Matrices, Matrices]:
    """The states [I, O] after a chunk and the chunk's output [C, O]."""
    length, width = v.shape
    spread = functools.partial(decays.spread, width=width)
    now, before = _pairs(keep[:2], keep[:2], 0), _pairs(keep[2:], keep[:2], 1)
    pushes = moves = since_start = None
    if momentum:
        pushes = _pairs(momentum[0][:2], momentum[0][:2], 0)
        moving = decays.spread(momentum[0][2:], length)
        weights, earlier = (mm(x, moving * pushes, jnp.float32) * lr for x in (now, before))
        since_start = jnp.exp(momentum[0][:1] + momentum[0][1:2])
        moves = since_start * momentum[0][2:]
    else:
        weights, earlier = now * lr, before * lr

    def found(x: Array, pairs: Array, sums: Float[Array, "2 C"]) -> Array:
        """x times what is left of the states that the chunk found."""
        left = spread(jnp.exp(sums[:1] + sums[1:])) * mm(x, states[0], dtype)
        if moves is None:
            return left
        return left + spread(mm_t(moves, pairs, jnp.float32)) * mm(x, states[1], dtype)

    system = earlier * mm_t(k, k, dtype) * decays.spread(seen, length)
    slopes = solve(system, spread(seen) * found(k, before, keep[2:]) - v)
    out = found(q, now, keep[:2]) - mm(weights * mm_t(q, k, dtype), slopes, dtype)

    end = slice(length - 1, length)
    left = jnp.exp(keep[:1, end] + keep[1:2, end])
    change = left * states[0] - t_mm(k * decays.spread(weights[end], k.shape[1]), slopes, dtype)
    if moves is None or pushes is None or since_start is None:
        return (change,), (out,)
    change = change + mm_t(moves, now[end], jnp.float32) * states[1]
    push = t_mm(k * decays.spread(pushes[end] * lr, k.shape[1]), slopes, dtype)
    return (change, since_start[:, end] * states[1] - push), (out,)


def _pairs(late: Float[Array, "2 C"], early: Float[Array, "2 C"], apart: int) -> Float[Array, "C C"]:
    """exp of the sum of logs behind token j up to token i, for i >= j + apart; 0 elsewhere."""
    length = late.shape[1]
    late, early = (jnp.concatenate([jax.lax.stop_gradient(x[:1]), x[1:]]) for x in (late, early))
    gaps = (decays.spread(late[:1], length) - early[:1]) + (decays.spread(late[1:], length) - early[1:])
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return jnp.exp(jnp.where(i >= j + apart, gaps, -jnp.inf))


def _forward(
    steps: Steps, inputs: _Inputs, states: Matrices
) -> tuple[tuple[Array, Matrices], tuple[_Inputs, Matrices]]:
    body = keeping(functools.partial(_chunk, inputs.v.dtype))
    kept = [Chunks(shaped(*x.shape[:2], steps.chunks, *x.shape[2:])) for x in states]
    made = (Tokens(shaped(*inputs.v.shape)), *kept)
    after, (out, *before) = walk("neural_memory_forward", body, steps, states, inputs.operands(), made)
    return (out, after), (inputs, tuple(before))


def _backward(
    steps: Steps, residuals: tuple[_Inputs, Matrices], slopes: tuple[Array, Matrices]
) -> tuple[_Inputs, Matrices]:
    inputs, before = residuals
    slope, late = slopes
    given, reverse = inputs.operands(), steps._replace(reverse=True)
    body = pulling(functools.partial(_chunk, inputs.v.dtype))
    known = (Tokens(slope), *(Chunks(x) for x in before))
    early, results = walk("neural_memory_backward", body, reverse, late, (*known, *given), given)
    return _Inputs(*results, *([None] if inputs.momentum is None else [])), early


_core.defvjp(_forward, _backward)
