"""Linear attention with an optional decay: the recurrence of RetNet, simple GLA, Mamba-2, GLA and HGRN2.

    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

State: K x V float32 per head. Source: Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.2. A decay constant per
head: RetNet (arXiv 2307.08621), section 2; per token: Mamba-2 (arXiv 2405.21060), section 5; per channel: GLA (arXiv
2312.06635), section 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.decay import broadcast_decay, step_decay_factor
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernels, require
from recallax.pallas_kernels.linear_attention import reference, xla
from recallax.pallas_kernels.linear_attention.reference import LinearAttentionArgs

__all__ = ["IMPLEMENTATIONS", "linear_attention", "linear_attention_step"]

IMPLEMENTATIONS = {
    "reference": reference.linear_attention,
    "xla": xla.linear_attention,
    **lazy_kernels("linear_attention", "mosaic_gpu", "mosaic_tpu"),
}


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    log_decay: Float[Array, " H"] | Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Compute causal linear attention over whole rows.

    Args:
        q: Queries of G heads, each shared by H / G consecutive value heads.
        k: Keys of G heads.
        v: Values.
        log_decay: Natural log-decay, at most 0: constant per head, per token, or per token and key channel.
        state: State before the row, which belongs to its first document; None: zeros.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        scale: Factor of q; None: K**-0.5.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output in v's dtype and final state in float32.

    Raises:
        ValueError: Shapes do not match.

    Examples:
        >>> import jax
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (2, 16, 4, 8)) for i in range(3))
        >>> whole, state = linear_attention(q, k, v, log_decay=jnp.full(4, -0.1))
        >>> first, state = linear_attention(q[:, :10], k[:, :10], v[:, :10], log_decay=jnp.full(4, -0.1))
        >>> second, _ = linear_attention(q[:, 10:], k[:, 10:], v[:, 10:], log_decay=jnp.full(4, -0.1), state=state)
        >>> bool(jnp.allclose(whole[:, 10:], second, atol=1e-5))
        True
    """
    b, t, groups, width = q.shape
    h = v.shape[2]
    require("linear_attention", t >= 1, f"q has {t} tokens; it needs at least 1")
    require("linear_attention", k.shape == q.shape, f"k has shape {k.shape}; it must be q's {q.shape}")
    require("linear_attention", v.shape[:2] == (b, t), f"v has shape {v.shape}; it must begin with {(b, t)}")
    require("linear_attention", h % groups == 0, f"v has {h} heads; it needs a multiple of q's {groups}")
    log_decay = broadcast_decay("linear_attention", log_decay, (b, t, h, width))
    state_shape = (b, h, width, v.shape[-1])
    if state is not None:
        require(
            "linear_attention", state.shape == state_shape, f"state has shape {state.shape}; it must be {state_shape}"
        )
    docs = None if segment_ids is None else index_documents(segment_ids)
    args = LinearAttentionArgs(q, k, v, log_decay, state, docs, width**-0.5 if scale is None else scale)
    return call_implementation("linear_attention", IMPLEMENTATIONS, implementation, args)


def linear_attention_step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
    active: Bool[Array, " B"],
    *,
    log_decay: Float[Array, " H"] | Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """Compute one token of `linear_attention`.

    Args:
        q: Query of each row.
        k: Key of each row.
        v: Value of each row.
        state: State before the token.
        active: Rows that have a token; the others keep their state and output 0.
        log_decay: Natural log-decay, at most 0: per head, or per head and key channel.
        scale: Factor of q; None: K**-0.5.

    Returns:
        Output in v's dtype and state after the token.
    """
    share = v.shape[1] // q.shape[1]
    q, k = (jnp.repeat(x.astype(state.dtype), share, axis=1) for x in (q, k))
    decayed = state if log_decay is None else step_decay_factor(log_decay, state) * state
    updated = decayed + k[..., None] * v.astype(state.dtype)[..., None, :]
    state = jnp.where(active[:, None, None, None], updated, state)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = jnp.einsum("bhk,bhkv->bhv", q, state)
    return jnp.where(active[:, None, None], out, 0).astype(v.dtype), state
