"""Definition of landmark attention: the weights of all pairs, in float32 or wider."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import accumulator_dtype
from recallax.pallas_kernels.landmark_attention.landmark_blocks import LandmarkCache


class LandmarkAttentionArgs(NamedTuple):
    """Checked arguments of an implementation of `landmark_attention`."""

    q: Float[Array, "B T H K"]
    """Scaled queries."""
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G V"]
    segment_ids: Int[Array, "B T"] | None
    """None: one document per row."""
    positions: Int[Array, "B T"]
    block_size: int
    """Tokens of a block besides its landmark."""
    cache: LandmarkCache | None
    """Blocks of the row's first document before the row; None: no tokens."""


class TokenPositions(NamedTuple):
    """Document and position of each token."""

    document_index: Int[Array, "B S"]
    """Negative for tokens that no query sees."""
    position: Int[Array, "B S"]


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    queries: TokenPositions,
    keys: TokenPositions,
    block_size: int,
) -> Float[Array, "B T H V"]:
    """y_i = sum_j w_ij v_j; 0 where nothing is visible. Query head h reads key/value head h // (H / G).

    w_ij = p_ij in i's own block, p_i,lm(b) r_ij in an earlier block b and 0 at landmarks. p is the softmax over the
    own block's tokens and all earlier landmarks; r is the softmax over the tokens of the block of j.
    """
    dtype, size = accumulator_dtype(q.dtype), block_size + 1
    heads_per_group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(dtype), heads_per_group, axis=2) for x in (k, v))
    block, landmark = keys.position // size, keys.position % size == block_size
    same = (keys.document_index[:, :, None] == keys.document_index[:, None]) & (block[:, :, None] == block[:, None])
    # [j, l]: l is a token of the block of j, or its landmark.
    block_tokens, block_landmark = (same & kind[:, None] for kind in (~landmark, landmark))

    def attend_one(query: tuple[Array, Array, Array]) -> Float[Array, "B H V"]:
        q, document, position = query
        scores = jnp.einsum("bhk,bshk->bhs", q.astype(dtype), k)
        visible = (keys.document_index == document[:, None]) & (keys.position <= position[:, None])
        earlier = block < position[:, None] // size
        p = _softmax(scores, visible & (earlier == landmark))
        r = _softmax(scores[:, :, None], block_tokens)  # [j, l]: softmax within the block of j
        r = jnp.einsum("bhjj->bhj", r)
        gate = jnp.einsum("bhl,bjl->bhj", p, block_landmark.astype(dtype))  # p of the landmark of the block of j
        weights = jnp.where((visible & ~landmark)[:, None], jnp.where(earlier[:, None], gate * r, p), 0)
        return jnp.einsum("bhs,bshv->bhv", weights, v)

    time_first = (jnp.moveaxis(x, 1, 0) for x in (q, *queries))
    return jnp.moveaxis(jax.lax.map(attend_one, tuple(time_first)), 0, 1)


def _softmax(scores: Float[Array, "B H ..."], visible: Bool[Array, "B ..."]) -> Float[Array, "B H ..."]:
    """Softmax over the visible entries of the last axis; 0 elsewhere."""
    visible = visible[:, None]
    any_visible = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible, scores, jnp.where(any_visible, -jnp.inf, 0))
    return jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
