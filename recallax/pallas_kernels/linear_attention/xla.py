"""Linear attention in chunks: quadratic inside a chunk, a carried state between chunks.

With L the cumulative log-decay of the chunk, s_ij = q_i.k_j and S the state at its start,

    o_i = exp(L_i) S^T phi(q_i) + sum_{j<=i} exp(L_i - L_j) f(s_ij) v_j
    S  <- exp(L_C) S + sum_j exp(L_C - L_j) phi(k_j) v_j^T

where f(q.k) = phi(q).phi(k); plain linear attention has f and phi the identity, BASED a polynomial and its features,
which are then built for the carried state only. A decay per channel goes inside the scores
(`decay.py`). Sums are float32; operands of products have the inputs' dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import Documents, join_time, masks_of, one_document, split_time, weight
from recallax.pallas_kernels.decay import decayed_scores, since_start, until_end
from recallax.pallas_kernels.heads import per_value_head
from recallax.pallas_kernels.product import product


class Kernel(NamedTuple):
    """A similarity f(q.k) = phi(q).phi(k); both functions are applied in float32."""

    score: Callable[[Array], Array]
    features: Callable[[Array], Array]


IDENTITY = Kernel(lambda s: s, lambda x: x)
CHUNK = 64
CHANNEL_CHUNK = 32
"""With a decay per channel, whose scores cost more per pair."""


class _Chunk(NamedTuple):
    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    decay: Float[Array, "B C H W"] | None
    docs: Documents


class _Carry(NamedTuple):
    state: Float[Array, "B H F V"] | None  # None: empty, so that a single chunk never builds its features of q
    document: Int[Array, " B"]


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H F V"] | None,
    docs: Documents | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The op's XLA form; `state` is float32; None is empty. log_decay: W is 1 (per token) or K (per channel)."""
    per_channel = log_decay is not None and log_decay.shape[-1] > 1
    q, k = per_value_head(q, k, v.shape[2], scale)
    chunk = min(CHUNK, CHANNEL_CHUNK) if per_channel else CHUNK
    return chunked(q, k, v, log_decay, state, docs, kernel=IDENTITY, chunk=chunk)


def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H F V"] | None,
    docs: Documents | None,
    *,
    kernel: Kernel,
    chunk: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """The same for any kernel; the state has the width of its features."""
    length = q.shape[1]
    docs = one_document(*q.shape[:2]) if docs is None else docs
    if log_decay is not None:
        log_decay = jnp.where(docs.valid[..., None, None], log_decay.astype(jnp.float32), 0)
    carry = _Carry(state, jnp.zeros_like(docs.index[:, 0]))
    whole = _Chunk(q, k, v, log_decay, docs)
    if length <= chunk:
        final, out = _chunk(kernel, carry, whole)
        return out, final
    if state is None:
        width = jax.eval_shape(kernel.features, k).shape[-1]
        carry = carry._replace(state=jnp.zeros((*k.shape[:1], k.shape[2], width, v.shape[-1]), jnp.float32))
    # The end is padded with copies of the last token that are marked invalid: they neither decay nor write.
    padded = jnp.pad(docs.valid, ((0, 0), (0, -length % chunk)))
    chunks = jax.tree.map(lambda x: split_time(x, chunk), whole)
    chunks = chunks._replace(docs=chunks.docs._replace(valid=split_time(padded, chunk)))
    if chunks.decay is not None:
        chunks = chunks._replace(decay=jnp.where(chunks.docs.valid[..., None, None], chunks.decay, 0))

    @jax.checkpoint  # keep states, not scores, for the backward
    def body(carry: _Carry, part: _Chunk) -> tuple[_Carry, Array]:
        state, out = _chunk(kernel, carry, part)
        return _Carry(state, part.docs.index[:, -1]), out

    carry, out = jax.lax.scan(body, carry, chunks)
    assert carry.state is not None
    return join_time(out, length), carry.state


def _chunk(kernel: Kernel, carry: _Carry, part: _Chunk) -> tuple[Float[Array, "B H F V"], Float[Array, "B C H V"]]:
    q, k, v, decay, docs = part
    dtype = v.dtype
    masks = masks_of(docs, carry.document)
    scores = decayed_scores(q, k, decay, masks.visible, kernel.score)
    features_k = kernel.features(k.astype(jnp.float32)) * weight(
        masks.kept, None if decay is None else until_end(decay)
    )
    out = product("bhij,bjhv->bihv", scores.astype(dtype), v)
    state = product("bjhf,bjhv->bhfv", features_k.astype(dtype), v)
    if carry.state is not None:
        total = None if decay is None else since_start(decay)
        features_q = kernel.features(q.astype(jnp.float32)) * weight(masks.own, total)
        out += product("bihf,bhfv->bihv", features_q.astype(dtype), carry.state.astype(dtype))
        state += weight(masks.stays, None if total is None else total[:, -1])[..., None] * carry.state
    return state, out.astype(dtype)
