"""The gated delta rule on TPUs: the chunks of `xla.py` in one walk, with the triangular system solved in VMEM.

    U = (I + A)^{-1} (w V - D(E) S)

is solved for one right-hand side, after the state is known. The forward pass keeps the state at each chunk's start; the
backward pass walks the chunks in reverse and differentiates the same body, so it computes each chunk once more.
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
    per_group,
    pulling,
    require_dtypes,
    shaped,
    steps_of,
    t_mm,
    time_major,
    walk,
)
from recallax.pallas_kernels.mosaic_tpu_channels import decay_of
from recallax.pallas_kernels.mosaic_tpu_solve import solve

CHUNK = 64


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    erase: Float[Array, "B T H W"],
    write: Float[Array, "B T H 1"],
    log_decay: Float[Array, "B T H W2"] | None,
    state: Float[Array, "B H K V"],
    docs: Documents | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for TPUs, of float32 or bfloat16 inputs of one dtype."""
    length = q.shape[1]
    steps = steps_of(CHUNK, length, v, q.shape[2])
    require_dtypes(q=q, k=k, v=v)
    if docs is not None:
        k = jnp.where(docs.valid[..., None, None], k, jnp.zeros((), k.dtype))  # padding neither erases nor writes
    gate = decays.log_decay_of(log_decay, docs, v.shape[2])
    gate = None if gate is None else head_major(gate, steps)
    if gate is not None and gate.shape[-1] == 1:
        gate = decays.running(in_chunks(gate[..., 0], steps))
    erase, write = (head_major(x.astype(jnp.float32), steps) for x in (erase, write))
    rows = (in_chunks(x[..., 0], steps)[:, :, :, None] for x in (erase, write))
    erase_row, write = rows
    q, k, v = (head_major(x, steps) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    out, final = _core(steps, _Inputs(q, k, v, erase_row if erase.shape[-1] == 1 else erase, write, gate), state)
    return time_major(out, length), final


class _Inputs(NamedTuple):
    """Of whole chunks, head-major."""

    q: Float[Array, "B G T K"]
    k: Float[Array, "B G T K"]
    v: Float[Array, "B H T V"]
    erase: Float[Array, "B H N 1 C"] | Float[Array, "B H T K"]
    write: Float[Array, "B H N 1 C"]
    gate: Float[Array, "B H N 2 C"] | Float[Array, "B H T K"] | None
    """Running sums of the log-decay per token, or the log-decay per channel; with the borders of documents inside."""

    def operands(self) -> list[Operand]:
        return [Chunks(x) if x.ndim == 5 else Tokens(x) for x in self if x is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    steps: Steps, inputs: _Inputs, state: Float[Array, "B H K V"]
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H K V"]]:
    body = functools.partial(_chunk, inputs.v.dtype)
    (final,), (out,) = walk("delta_rule_forward", body, steps, (state,), inputs.operands(), (Tokens(inputs.v),))
    return out, final


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    erase: Float[Array, "1 C"] | Float[Array, "C K"],
    write: Float[Array, "1 C"],
    *gates: Float[Array, "2 C"] | Float[Array, "C K"],
) -> tuple[Matrices, Matrices]:
    """The state [K, V] after a chunk and the chunk's output [C, V]."""
    (state,) = states
    decay = decay_of(gates, *q.shape)
    # A strength per token scales rows in float32, after a product of the keys as they are.
    per_token = erase.shape[0] == 1
    erasers = k if per_token else k * erase
    scores = decay.scores(erasers, k, dtype)
    held = mm(decays.scaled(erasers, decay.since_start), state, dtype)
    if per_token:
        scores, held = (x * decays.spread(erase, x.shape[1]) for x in (scores, held))
    new = solve(scores, v * decays.spread(write, v.shape[1]) - held)
    out = mm(decays.scaled(q, decay.since_start), state, dtype) + mm(decay.scores(q, k, dtype), new, dtype)
    written = t_mm(decays.scaled(k, decay.until_end), new, dtype)
    return (decays.scaled(state, decay.total) + written,), (out,)


def _forward(
    steps: Steps, inputs: _Inputs, state: Array
) -> tuple[tuple[Array, Array], tuple[_Inputs, Float[Array, "B H N K V"]]]:
    body = keeping(functools.partial(_chunk, inputs.v.dtype))
    kept = Chunks(shaped(*state.shape[:2], steps.chunks, *state.shape[2:]))
    (final,), (out, states) = walk(
        "delta_rule_forward", body, steps, (state,), inputs.operands(), (Tokens(inputs.v), kept)
    )
    return (out, final), (inputs, states)


def _backward(
    steps: Steps, residuals: tuple[_Inputs, Array], slopes: tuple[Array, Array]
) -> tuple[_Inputs, Float[Array, "B H K V"]]:
    inputs, states = residuals
    slope, late = slopes
    q, dtype, given = inputs.q, inputs.v.dtype, inputs.operands()
    # One slope per value head; those that share a key head are summed outside, in float32.
    heads = inputs.v.shape[1]
    own = Tokens(shaped(q.shape[0], heads, *q.shape[2:], dtype=q.dtype if q.shape[1] == heads else jnp.float32))
    reverse = steps._replace(reverse=True)
    body = pulling(functools.partial(_chunk, dtype))
    before = (Tokens(slope), Chunks(states))
    (early,), results = walk("delta_rule_backward", body, reverse, (late,), (*before, *given), (own, own, *given[2:]))
    dq, dk, dv, erase, write, *gate = results
    dq, dk = (per_group(x, q.shape[1]).astype(q.dtype) for x in (dq, dk))
    return _Inputs(dq, dk, dv, erase, write, gate[0] if gate else None), early


_core.defvjp(_forward, _backward)
