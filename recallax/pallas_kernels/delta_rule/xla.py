"""The gated delta rule in chunks: a triangular system inside a chunk, a carried state between chunks.

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

from recallax.pallas_kernels.chunking import Documents, join_time, masks_of, one_document, split_time, weight
from recallax.pallas_kernels.decay import decayed_scores, since_start, until_end
from recallax.pallas_kernels.heads import per_value_head
from recallax.pallas_kernels.product import product
from recallax.pallas_kernels.triangular import unit_lower_inverse

CHUNK = 32


class _Chunk(NamedTuple):
    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    erase: Float[Array, "B C H W"]
    write: Float[Array, "B C H 1"]
    decay: Float[Array, "B C H W2"] | None
    docs: Documents


class _Solved(NamedTuple):
    """A chunk's effect on any incoming state."""

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
    """The op's XLA form."""
    length = q.shape[1]
    docs = one_document(*q.shape[:2]) if docs is None else docs
    q, k = per_value_head(q, k, v.shape[2], scale)
    chunk = min(CHUNK, length)
    chunks = jax.tree.map(lambda x: split_time(x, chunk), _Chunk(q, k, v, erase, write, log_decay, docs))
    # The end is padded with copies of the last token that are marked invalid.
    filled = split_time(jnp.pad(docs.valid, ((0, 0), (0, -length % chunk))), chunk)
    chunks = chunks._replace(docs=chunks.docs._replace(valid=filled))

    @jax.checkpoint  # keep states for the backward, not what is computed within a chunk
    def body(carry: tuple[Array, Array], part: _Chunk) -> tuple[tuple[Array, Array], Array]:
        state, document = carry
        solved = _solve(part, document)
        held = product("bihk,bhkv->bihv", solved.erases.astype(v.dtype), state.astype(v.dtype))
        new = (solved.writes - held).astype(v.dtype)
        out = product("bihk,bhkv->bihv", solved.reads, state.astype(v.dtype))
        out += product("bhij,bjhv->bihv", solved.scores.astype(v.dtype), new)
        state = solved.stays * state + product("bjhk,bjhv->bhkv", solved.keys, new)
        return (state, part.docs.index[:, -1]), out.astype(v.dtype)

    (state, _), out = jax.lax.scan(body, (state, jnp.zeros_like(docs.index[:, 0])), chunks)
    return join_time(out, length), state


def _solve(part: _Chunk, document: Int[Array, " B"]) -> _Solved:
    q, k, v, erase, write, log_decay, docs = part
    valid = docs.valid[..., None, None]  # padding neither decays nor erases nor writes
    erase, write = (jnp.where(valid, x.astype(jnp.float32), 0) for x in (erase, write))
    if log_decay is not None:
        log_decay = jnp.where(valid, log_decay.astype(jnp.float32), 0)
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
    return _Solved(
        reads=(q.astype(jnp.float32) * from_state).astype(q.dtype),
        erases=product("bhij,bjhk->bihk", inverse, erasers * from_state),
        writes=product("bhij,bjhv->bihv", inverse, v.astype(jnp.float32) * write),
        keys=(k.astype(jnp.float32) * weight(masks.kept, rest)).astype(k.dtype),
        scores=decayed_scores(q, k, log_decay, masks.visible),
        stays=weight(masks.stays, None if total is None else total[:, -1])[..., None],
    )
