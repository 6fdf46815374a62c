"""The definition of landmark attention: every weight of every pair from its groups, in float32 or wider."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import accumulator_dtype


class TokenPositions(NamedTuple):
    """Where tokens stand."""

    document_index: Int[Array, "B S"]
    """Below 0 for what nobody sees."""
    position: Int[Array, "B S"]


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    queries: TokenPositions,
    keys: TokenPositions,
    block_size: int,
) -> Float[Array, "B T H V"]:
    """y_i = sum_j w_ij v_j; 0 where nothing is visible. Head h reads group h // (H/G).

    w_ij = p_ij in i's own block, p_i,lm(b) r_ij in an earlier block b and 0 at landmarks: p is the softmax over the
    own block's tokens and all earlier landmarks, r over the tokens of the block of j.
    """
    wide, size = accumulator_dtype(q.dtype), block_size + 1
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(wide), groups, axis=2) for x in (k, v))
    block, landmark = keys.position // size, keys.position % size == block_size
    same = (keys.document_index[:, :, None] == keys.document_index[:, None]) & (block[:, :, None] == block[:, None])
    siblings, marks = (same & kind[:, None] for kind in (~landmark, landmark))  # of j: the block's tokens, its landmark

    def one(query: tuple[Array, Array, Array]) -> Float[Array, "B H V"]:
        q, document, position = query
        scores = jnp.einsum("bhk,bshk->bhs", q.astype(wide), k)
        seen = (keys.document_index == document[:, None]) & (keys.position <= position[:, None])
        earlier = block < position[:, None] // size
        p = _softmax(scores, seen & (earlier == landmark))
        r = _softmax(scores[:, :, None], siblings)  # of every j, within its block
        r = jnp.einsum("bhjj->bhj", r)
        chosen = jnp.einsum("bhl,bjl->bhj", p, marks.astype(wide))  # p of the landmark of the block of j
        weights = jnp.where((seen & ~landmark)[:, None], jnp.where(earlier[:, None], chosen * r, p), 0)
        return jnp.einsum("bhs,bshv->bhv", weights, v)

    time_first = (jnp.moveaxis(x, 1, 0) for x in (q, *queries))
    return jnp.moveaxis(jax.lax.map(one, tuple(time_first)), 0, 1)


def _softmax(scores: Float[Array, "B H ..."], visible: Bool[Array, "B ..."]) -> Float[Array, "B H ..."]:
    """Over the last axis, of what is visible; 0 elsewhere."""
    visible = visible[:, None]
    some = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible, scores, jnp.where(some, -jnp.inf, 0))
    return jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
