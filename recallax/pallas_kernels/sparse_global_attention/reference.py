"""The definition of sparse global attention: every score of every pair, and every token's rank among the candidates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import Documents, accumulator
from recallax.pallas_kernels.sparse_global_attention.pool import NEVER, Pool, eligible, scores


def attend(
    q: Float[Array, "B T H K"],
    pool: Pool,
    positions: Int[Array, "B T"],
    docs: Documents,
    ask: Float[Array, "B T R"],
    window: int,
    chosen: int,
    size: int,
    weighed: bool,
) -> Float[Array, "B T H V"]:
    """Token by token; `ask` is that of each token's block. q is scaled already."""
    wide = accumulator(q.dtype)

    def token(q: Array, at: Array, document: Array, ask: Array) -> Array:
        wanted = scores(pool.offer, ask[:, None])
        candidate = eligible(pool, document, at // size * size, size, window)
        order = jnp.argsort(jnp.where(candidate, -jax.lax.stop_gradient(wanted), -NEVER), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        distance = at[:, None] - pool.position
        near = (pool.document == document[:, None]) & (distance >= 0) & (distance < window)
        far = candidate & (rank < chosen) & (distance >= window)
        bias = jnp.where(far & weighed, jax.nn.log_sigmoid(wanted).astype(wide), 0)
        return _softmax(q, pool.k, pool.v, near | far, bias, wide)

    return jax.vmap(token, in_axes=1, out_axes=1)(q, positions, docs.index, ask)


def _softmax(
    q: Float[Array, "B H K"],
    k: Float[Array, "B P G K"],
    v: Float[Array, "B P G V"],
    visible: Bool[Array, "B P"],
    bias: Float[Array, "B P"],
    wide,
) -> Float[Array, "B H V"]:
    k, v = (jnp.repeat(x.astype(wide), q.shape[1] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bhk,bphk->bhp", q.astype(wide), k) + bias[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, NEVER), axis=-1)
    return jnp.einsum("bhp,bphv->bhv", jnp.where(visible[:, None], weights, 0), v)
