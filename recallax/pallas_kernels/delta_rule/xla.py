"""The gated delta rule in chunks: everything within a chunk for all chunks at once, then a walk over the states.

With L the cumulative log-decay, D(x)_i = exp(L_i) x_i, e = b k, and S the state at the chunk's start,

    A_ij = sum_d e_id k_jd exp(L_id - L_jd)  (j < i)      T = (I + A)^{-1}
    U = T (w V) - T D(E) S                                O = D(Q) S + A^{qk} U
    S <- exp(L_C) S + (exp(L_C - L) K)^T U

(the UT transform of DeltaNet, arXiv 2406.06484, section 3.2). T and what it multiplies are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recallax.pallas_kernels.chunking import Documents, join_time, masks_of, split_time, weight
from recallax.pallas_kernels.decay import decayed_scores, since_start, until_end
from recallax.pallas_kernels.product import product
from recallax.pallas_kernels.triangular import unit_lower_inverse

CHUNK = 64


class _Chunk(NamedTuple):
    """What the walk over states needs of one chunk."""

    reads: Float[Array, "B C H K"]
    """Queries, decayed since the chunk's start, of the incoming state's document."""
    erases: Float[Array, "B C H K"]
    """T D(E): what the incoming state takes away from each write."""
    writes: Float[Array, "B C H V"]
    """T (w V)."""
    keys: Float[Array, "B C H K"]
    """Keys, decayed until the chunk's end, of the last document."""
    scores: Float[Array, "B H C C"]
    stays: Float[Array, "B H W 1"]


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    erase: Float[Array, "B T H W"],
    write: Float[Array, "B T H 1"],
    log_decay: Float[Array, "B T H W2"] | None,
    state: Float[Array, "B H K V"],
    docs: Documents,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The op's XLA form."""
    length = q.shape[1]
    chunk = min(CHUNK, length)
    valid = docs.valid[..., None, None]
    # Padding neither decays nor erases nor writes; so do the copies of the last token that fill the last chunk.
    erase, write = (jnp.where(valid, x.astype(jnp.float32), 0) for x in (erase, write))
    if log_decay is not None:
        log_decay = jnp.where(valid, log_decay.astype(jnp.float32), 0)
    parts = jax.tree.map(lambda x: split_time(x, chunk), (q, k, v, erase, write, log_decay, docs))
    filled = split_time(jnp.pad(docs.valid, ((0, 0), (0, -length % chunk))), chunk)
    *_, last_erase, last_write, last_decay, last_docs = parts
    silent = filled[..., None, None]
    parts = (
        *parts[:3],
        jnp.where(silent, last_erase, 0),
        jnp.where(silent, last_write, 0),
        None if last_decay is None else jnp.where(silent, last_decay, 0),
        last_docs._replace(valid=filled),
    )
    ends = parts[-1].index[:, :, -1]  # the document that each chunk hands on
    incoming = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    chunks = jax.checkpoint(jax.vmap(_within))(*parts, incoming)

    @jax.checkpoint  # keep states for the backward, not what is computed from them
    def body(state: Array, part: _Chunk) -> tuple[Array, Array]:
        held = product("bihk,bhkv->bihv", part.erases.astype(v.dtype), state.astype(v.dtype))
        new = (part.writes - held).astype(v.dtype)
        out = product("bihk,bhkv->bihv", part.reads, state.astype(v.dtype))
        out += product("bhij,bjhv->bihv", part.scores.astype(v.dtype), new)
        return part.stays * state + product("bjhk,bjhv->bhkv", part.keys, new), out.astype(v.dtype)

    state, out = jax.lax.scan(body, state, chunks)
    return join_time(out, length), state


def _within(
    q: Float[Array, "B C H K"],
    k: Float[Array, "B C H K"],
    v: Float[Array, "B C H V"],
    erase: Float[Array, "B C H W"],
    write: Float[Array, "B C H 1"],
    log_decay: Float[Array, "B C H W2"] | None,
    docs: Documents,
    document: Int[Array, " B"],
) -> _Chunk:
    masks = masks_of(docs, document)
    earlier = masks.visible & ~jnp.eye(q.shape[1], dtype=bool)[None]
    total = None if log_decay is None else since_start(log_decay)
    rest = None if log_decay is None else until_end(log_decay)
    # The strength of erasing scales rows of the scores: in float32, after a product of the keys as they are.
    if erase.shape[-1] == 1:
        scores = decayed_scores(k, k, log_decay, earlier) * jnp.moveaxis(erase, 1, 2)
        erasers = k.astype(jnp.float32) * erase
    else:
        erasers = k.astype(jnp.float32) * erase
        scores = decayed_scores(erasers.astype(k.dtype), k, log_decay, earlier)
    inverse = unit_lower_inverse(scores)
    from_state = weight(masks.own, total)
    return _Chunk(
        reads=(q.astype(jnp.float32) * from_state).astype(q.dtype),
        erases=product("bhij,bjhk->bihk", inverse, erasers * from_state),
        writes=product("bhij,bjhv->bihv", inverse, v.astype(jnp.float32) * write),
        keys=(k.astype(jnp.float32) * weight(masks.kept, rest)).astype(k.dtype),
        scores=decayed_scores(q, k, log_decay, masks.visible),
        stays=weight(masks.stays, None if total is None else total[:, -1])[..., None],
    )
