"""Definition of softmax attention with a mask: the scores of all pairs, in float32 or wider."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype
from recallax.pallas_kernels.kv_cache import KVCache, PersistentKV


class WindowAttentionArgs(NamedTuple):
    """Checked arguments of an implementation of `window_attention`."""

    q: Float[Array, "B T H K"]
    """Scaled queries."""
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G V"]
    document_ids: DocumentIds | None
    """None: one document per row."""
    window: int | None
    """Tokens that a query sees, itself included; None: all earlier tokens."""
    persistent: PersistentKV | None
    """Keys and values that every query sees."""
    cache: KVCache | None
    """Keys and values of the tokens before the row."""
    positions: Int[Array, "B T"] | None
    """Positions within documents; given with a cache."""


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H V"]:
    """y_i = sum_j softmax_j(q_i.k_j over visible j) v_j; 0 where nothing is visible.

    Query head h reads key/value head h // (H / G).
    """
    dtype = accumulator_dtype(q.dtype)
    heads_per_group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(dtype), heads_per_group, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q.astype(dtype), k)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    any_visible = visible.any(axis=-1)[:, None, :, None]
    weights = jnp.where(visible[:, None], jax.nn.softmax(jnp.where(any_visible, scores, 0), axis=-1), 0)
    return jnp.einsum("bhts,bshv->bthv", weights, v)
