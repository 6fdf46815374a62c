"""Definition of the gated delta rule: a scan over tokens, in float32 or wider."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds, accumulator_dtype, single_document
from recallax.pallas_kernels.grouped_heads import repeat_heads


class DeltaRuleArgs(NamedTuple):
    """Checked arguments of an implementation of `delta_rule`."""

    q: Float[Array, "B T G K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T H V"]
    erase: Float[Array, "B T H W"]
    """Erase strength; W is 1 or K."""
    write: Float[Array, "B T H 1"]
    log_decay: Float[Array, "B T H W2"] | None
    """Natural log-decay; W2 is 1 or K."""
    state: Float[Array, "B H K V"]
    document_ids: DocumentIds | None
    """None: one document per row."""
    scale: float
    """Factor of q."""


def delta_rule(args: DeltaRuleArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = (I - k_t e_t^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t v_t)^T,  o_t = scale S_t^T q_t.

    S is 0 where a document starts.
    """
    q, k, v, erase, write, log_decay, state, document_ids, scale = args

    def step(carry, token):
        state, document = carry
        q, k, v, erase, write, log_decay, index, valid = token
        previous = jnp.where((index == document)[:, None, None, None], state, 0)
        decayed = jnp.exp(log_decay)[..., None] * previous
        erased = jnp.einsum("bhk,bhkv->bhv", erase * k, decayed)
        updated = decayed + k[..., None] * (write * v - erased)[..., None, :]
        state = jnp.where(valid[:, None, None, None], updated, previous)
        return (state, index), jnp.einsum("bhk,bhkv->bhv", q, state)

    dtype = accumulator_dtype(q.dtype)
    document_ids = single_document(*q.shape[:2]) if document_ids is None else document_ids
    q, k = repeat_heads(q.astype(dtype), k, v.shape[2], scale)
    log_decay = jnp.zeros((*q.shape[:3], 1), dtype) if log_decay is None else log_decay
    tokens = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, erase, write, log_decay))
    tokens += tuple(jnp.moveaxis(x, 1, 0) for x in document_ids)
    carry = (state.astype(dtype), jnp.zeros_like(document_ids.index[:, 0]))
    (state, _), out = jax.lax.scan(step, carry, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), state
