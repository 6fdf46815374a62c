"""BASED on TPUs: the polynomial of the scores inside a chunk, the symmetric features for the carried state only.

Feature f is w_f a_f b_f, where a_f and b_f are a channel of x each or 1. So features are two products with 0-1
matrices, which pick the channels, and never exist outside VMEM. The backward pass takes the states at the chunks'
starts from the forward pass and walks in reverse, as that of the delta rule.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels import mosaic_tpu_decay as decays
from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.dispatch import Unsupported
from recallax.pallas_kernels.feature_maps import taylor, taylor_score
from recallax.pallas_kernels.mosaic_tpu import (
    Chunks,
    Matrices,
    Operand,
    Shared,
    Steps,
    Tokens,
    head_major,
    in_chunks,
    keeping,
    mm,
    require_dtypes,
    shaped,
    steps_of,
    t_mm,
    time_major,
    walk,
)
from recallax.pallas_kernels.mosaic_tpu_channels import decay_of

CHUNK = 128


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    docs: Documents | None,
    features: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The op's form for TPUs, of symmetric features and of float32 or bfloat16 inputs of one dtype."""
    length, width = q.shape[1], q.shape[3]
    steps = steps_of(CHUNK, length, v, q.shape[2])
    require_dtypes(q=q, k=k, v=v)
    if features is not taylor:
        raise Unsupported("the features are not symmetric; it holds each product of two channels once")
    if docs is not None:  # padding does not write; as a key of zeros would, with its constant feature
        v = jnp.where(docs.valid[..., None, None], v, jnp.zeros((), v.dtype))
    gate = decays.log_decay_of(None, docs, v.shape[2])
    gate = None if gate is None else decays.running(in_chunks(head_major(gate, steps)[..., 0], steps))
    if state is None:
        state = jnp.zeros((v.shape[0], v.shape[2], _factors(width).shape[1] // 2, v.shape[3]), jnp.float32)
    q, k, v = (head_major(x, steps) for x in (q, k, v))
    out, final = _core(steps, q, k, v, gate, state)
    return time_major(out, length), final


def _factors(width: int) -> np.ndarray:
    """[K + 2, 2 F]: which channel each feature's two factors are, 1 added to it, and (first half) the weight."""
    first, second, weight = [width, *[width] * width], [width, *range(width)], [1.0] * (width + 1)
    for i in range(width):
        first += [i] * (width - i)
        second += range(i, width)
        weight += [math.sqrt(0.5)] + [1.0] * (width - i - 1)
    table = np.zeros((width + 2, 2 * len(first)), np.float32)
    table[first + second, np.arange(2 * len(first))] = 1
    table[width + 1, : len(first)] = weight
    return table


def _features(x: Float[Array, "C K"], factors: Float[Array, "K2 F2"], dtype: DTypeLike) -> Float[Array, "C F"]:
    width, count = x.shape[1], factors.shape[1] // 2
    first, second = factors[:, :count], factors[:, count:]
    a = mm(x, first[:width], dtype) + first[width : width + 1]
    b = mm(x, second[:width], dtype) + second[width : width + 1]
    return a * b * first[width + 1 :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    steps: Steps,
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H T K"],
    v: Float[Array, "B H T V"],
    gate: Float[Array, "B H N 2 C"] | None,
    state: Float[Array, "B H F V"],
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H F V"]]:
    """Of whole chunks, head-major; the gate holds the borders of documents."""
    body = functools.partial(_chunk, v.dtype)
    (final,), (out,) = walk("taylor_attention_forward", body, steps, (state,), _operands(q, k, v, gate), (Tokens(v),))
    return out, final


def _operands(q: Array, k: Array, v: Array, gate: Array | None) -> tuple[Operand, ...]:
    given = (Shared(jnp.asarray(_factors(q.shape[3]))), Tokens(q), Tokens(k), Tokens(v))
    return given if gate is None else (*given, Chunks(gate))


def _chunk(
    dtype: DTypeLike,
    states: Matrices,
    factors: Float[Array, "K2 F2"],
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    *gates: Float[Array, "2 C"],
) -> tuple[Matrices, Matrices]:
    """The state [F, V] after a chunk and the chunk's sums [C, V]."""
    (state,) = states
    decay = decay_of(gates, q.shape[0], state.shape[0])
    phi_q, phi_k = (_features(x, factors, dtype) for x in (q, k))
    out = mm(decay.scores(q, k, dtype, taylor_score), v, dtype)
    out = out + mm(decays.scaled(phi_q, decay.since_start), state, dtype)
    written = t_mm(decays.scaled(phi_k, decay.until_end), v, dtype)
    return (decays.scaled(state, decay.total) + written,), (out,)


def _back(
    dtype: DTypeLike,
    states: Matrices,
    slope: Array,
    state: Array,
    factors: Array,
    q: Array,
    k: Array,
    v: Array,
    *gates: Array,
) -> tuple[Matrices, Matrices]:
    """The slope of the state before a chunk, and those of q, k and v; backward in time."""

    def forward(state: Array, q: Array, k: Array, v: Array) -> tuple[Matrices, Matrices]:
        return _chunk(dtype, (state,), factors, q, k, v, *gates)

    _, pull = jax.vjp(forward, state, q, k, v)
    early, *slopes = pull((states, (slope,)))
    return (early,), tuple(slopes)


type TaylorResiduals = tuple[Array, Array, Array, Array | None, Array]


def _forward(
    steps: Steps, q: Array, k: Array, v: Array, gate: Array | None, state: Array
) -> tuple[tuple[Array, Array], TaylorResiduals]:
    kept = Chunks(shaped(*state.shape[:2], steps.chunks, *state.shape[2:]))
    body = keeping(functools.partial(_chunk, v.dtype))
    (final,), (out, states) = walk(
        "taylor_attention_forward", body, steps, (state,), _operands(q, k, v, gate), (Tokens(v), kept)
    )
    return (out, final), (q, k, v, gate, states)


def _backward(steps: Steps, residuals: TaylorResiduals, slopes: tuple[Array, Array]) -> tuple[Array | None, ...]:
    q, k, v, gate, states = residuals
    slope, late = slopes
    inputs = (Tokens(slope), Chunks(states), *_operands(q, k, v, gate))
    body = functools.partial(_back, v.dtype)
    (early,), (dq, dk, dv) = walk(
        "taylor_attention_backward",
        body,
        steps._replace(reverse=True),
        (late,),
        inputs,
        (Tokens(q), Tokens(k), Tokens(v)),
    )
    return dq, dk, dv, None if gate is None else jnp.zeros_like(gate), early


_core.defvjp(_forward, _backward)
