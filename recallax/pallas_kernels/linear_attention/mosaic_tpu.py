"""Linear attention on TPUs: each pass walks over the chunks with its state in VMEM, and no other state is ever stored.

Forward as in `xla.py`. Backward in two passes, of which each needs one of the two states: the queries' slopes need
the state S, forward in time; those of keys and values need the slope of the state, backward in time. That of the
log-decay needs both at each token, but it is also a sum over them,

    dg_t = sum_{i >= t} (q_i.dq_i - k_i.dk_i) + <dS_T, S_T>

since g_t scales everything that passes from before t to the readers from t on (as in FlashLinearAttention; GLA, arXiv
2312.06635, appendix C). The sum ends where everything is forgotten, so no rounding leaks over a document's border.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recallax.pallas_kernels import mosaic_tpu_decay as decays
from recallax.pallas_kernels.chunking import Documents
from recallax.pallas_kernels.dispatch import Unsupported, interpreting
from recallax.pallas_kernels.mosaic_tpu import Rows, States, Steps, Tokens, block_of, mm, mm_t, t_mm, walk

CHUNK = 128


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H K V"] | None,
    docs: Documents | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's form for TPUs, of float32 or bfloat16 inputs of one dtype."""
    interpret = interpreting("tpu")
    rows, length, groups, width = q.shape
    heads, values = v.shape[2:]
    if log_decay is not None and log_decay.shape[-1] > 1:
        raise Unsupported(f"log_decay has {log_decay.shape[-1]} channels; it takes one log-decay per token")
    if not q.dtype == k.dtype == v.dtype or v.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must all be bfloat16 or all float32")
    chunk = min(CHUNK, -(-length // 16) * 16)
    pad = -length % chunk
    steps = Steps(rows, heads, block_of(heads, groups), chunk, (length + pad) // chunk, interpret)
    gate = decays.log_decay_of(log_decay, docs, heads)
    if docs is not None:
        k = jnp.where(docs.valid[..., None, None], k, jnp.zeros((), k.dtype))
    if state is None:
        state = jnp.zeros((rows, heads, width, values), jnp.float32)

    def head_major(x: Array) -> Array:
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), 1, 2)  # zeros neither decay nor write

    q = q * jnp.asarray(scale, q.dtype)
    gate = None if gate is None else head_major(gate)[..., 0]
    out, final = _core(steps, head_major(q), head_major(k), head_major(v), gate, state)
    return jnp.moveaxis(out, 1, 2)[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    steps: Steps,
    q: Float[Array, "B G T K"],
    k: Float[Array, "B G T K"],
    v: Float[Array, "B H T V"],
    log_decay: Float[Array, "B H T"] | None,
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H K V"]]:
    """Of whole chunks, head-major, with the borders of documents inside the log-decay."""
    body = functools.partial(_chunk, v.dtype)
    inputs = (Tokens(q), Tokens(k), Tokens(v), *_gates(steps, log_decay))
    final, out = walk("linear_attention_forward", body, steps, state, inputs, (Tokens(v),))
    return out, final


def _gates(steps: Steps, log_decay: Float[Array, "B H T"] | None) -> tuple[Rows, ...]:
    return () if log_decay is None else (Rows(decays.running(log_decay, steps.chunk)),)


def _chunk(
    dtype: DTypeLike,
    state: Float[Array, "K V"],
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    *gates: Float[Array, "2 C"],
) -> tuple[Float[Array, "K V"], Float[Array, "C V"]]:
    """The state after a chunk and the chunk's output."""
    decay = decays.token_decay(*gates) if gates else decays.no_decay(q.shape[0])
    scores = mm_t(q, k, dtype) * decay.between
    out = mm(scores, v, dtype) + decays.scaled(mm(q, state, dtype), decay.since_start)
    written = t_mm(decays.scaled(k, decay.until_end), v, dtype)
    return decays.scaled(state, decay.total) + written, out


def _reading(dtype: DTypeLike, state: Array, q: Array, k: Array, v: Array, slope: Array, *gates: Array):
    """The state after a chunk, the slope of q, and q.dq; forward in time."""

    def read(q: Array) -> tuple[Array, Array]:
        new, out = _chunk(dtype, state, q, k, v, *gates)
        return out, new

    _, pull, new = jax.vjp(read, q, has_aux=True)
    (dq,) = pull(slope)
    return new, dq, _dots(q, dq)


def _writing(dtype: DTypeLike, late: Array, q: Array, k: Array, v: Array, slope: Array, *gates: Array):
    """The slope of the state before a chunk, those of k and v, and k.dk; backward in time."""
    # The chunk is linear in its state, so none of these depends on what the state is.
    _, pull = jax.vjp(lambda state, k, v: _chunk(dtype, state, q, k, v, *gates), jnp.zeros_like(late), k, v)
    early, dk, dv = pull((late, slope))
    return early, dk, dv, _dots(k, dk)


def _dots(x: Float[Array, "C K"], y: Float[Array, "C K"]) -> Float[Array, "1 C"]:
    return mm_t(jnp.ones((1, x.shape[1]), jnp.float32), x * y, jnp.float32)


def _forward(steps: Steps, q: Array, k: Array, v: Array, log_decay: Array | None, state: Array):
    out, final = _core(steps, q, k, v, log_decay, state)
    return (out, final), (q, k, v, log_decay, state, final)


def _backward(steps: Steps, residuals: tuple, slopes: tuple[Array, Array]):
    q, k, v, log_decay, state, final = residuals
    slope, late = slopes
    dtype, groups = v.dtype, q.shape[1]
    inputs = (Tokens(q), Tokens(k), Tokens(v), Tokens(slope), *_gates(steps, log_decay))
    # One slope per value head; those that share a key head are summed outside, in float32.
    own = jax.ShapeDtypeStruct((*v.shape[:3], q.shape[3]), q.dtype if groups == v.shape[1] else jnp.float32)
    dots = jax.ShapeDtypeStruct((*v.shape[:2], 1, v.shape[2]), jnp.float32)
    _, dq, q_dq = walk(
        "linear_attention_reading",
        functools.partial(_reading, dtype),
        steps,
        state,
        inputs,
        (Tokens(own), Rows(dots)),
    )
    early, dk, dv, k_dk = walk(
        "linear_attention_writing",
        functools.partial(_writing, dtype),
        steps._replace(reverse=True),
        late,
        inputs,
        (Tokens(own), Tokens(v), Rows(dots)),
    )
    dq, dk = (_per_group(x, groups).astype(q.dtype) for x in (dq, dk))
    if log_decay is None:
        return dq, dk, dv, None, early
    at_end = jnp.sum(late * final, axis=(2, 3))[..., None]
    last = jnp.arange(v.shape[2]) == v.shape[2] - 1
    change = (q_dq - k_dk)[:, :, 0] + jnp.where(last[None, None], at_end, 0)
    return dq, dk, dv, decays.suffix_sums(change, log_decay), early


def _per_group(x: Float[Array, "B H T K"], groups: int) -> Float[Array, "B G T K"]:
    return jnp.sum(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), axis=2) if groups < x.shape[1] else x


_core.defvjp(_forward, _backward)
