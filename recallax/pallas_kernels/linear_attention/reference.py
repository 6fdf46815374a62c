"""The definition of gated linear attention: one token after another, in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, single_document
from recallax.pallas_kernels.repeat_heads import repeat_heads


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H W"] | None,
    state: Float[Array, "B H K V"] | None,
    document_ids: DocumentIds | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t; S is zeroed where a document starts."""

    def step(carry, token):
        state, document = carry
        q, k, v, log_decay, index, valid = token
        kept = jnp.where((index == document)[:, None, None, None], state, 0)
        new = jnp.exp(log_decay)[..., None] * kept + k[..., None] * v[..., None, :]
        state = jnp.where(valid[:, None, None, None], new, kept)
        return (state, index), jnp.einsum("bhk,bhkv->bhv", q, state)

    wide = accumulator_dtype(q.dtype)
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    q, k = repeat_heads(q.astype(wide), k, v.shape[2], scale)
    log_decay = jnp.zeros((*q.shape[:3], 1), wide) if log_decay is None else log_decay
    state = jnp.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]), wide) if state is None else state
    tokens = tuple(jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, log_decay))
    tokens += tuple(jnp.moveaxis(x, 1, 0) for x in document_ids)
    first = (state.astype(wide), jnp.zeros_like(document_ids.index[:, 0]))
    (state, _), out = jax.lax.scan(step, first, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), state
