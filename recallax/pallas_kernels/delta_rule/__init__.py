"""The gated delta rule: a memory that erases what it held under a key before it writes (DeltaNet and its family).

    S_t = (I - k_t e_t^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t v_t)^T,   e_t = b_t k_t        o_t = scale * S_t^T q_t

b is the strength of erasing and w that of writing; both are beta in DeltaNet (no g), Gated DeltaNet (g per token) and
KDA (g per channel). Decay comes first, then erasure. With unit keys, b up to 1 forgets, and b in (1, 2] reflects
(negative eigenvalues). State: K x V float32 per value head.

Source: Yang et al. 2024 (arXiv 2406.06484), section 3; Gated DeltaNet (arXiv 2412.06464), equation 10, whose chunk form
prints the sign of the inverse wrongly; KDA (Kimi Linear, arXiv 2510.26692), section 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.decay import broadcast_decay, step_decay_factor
from recallax.pallas_kernels.delta_rule import reference, xla
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernel, require

IMPLEMENTATIONS = {
    "reference": reference.delta_rule,
    "xla": xla.delta_rule,
    "mosaic_gpu": lazy_kernel("recallax.pallas_kernels.delta_rule.mosaic_gpu", "delta_rule"),
    "mosaic_tpu": lazy_kernel("recallax.pallas_kernels.delta_rule.mosaic_tpu", "delta_rule"),
}


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    *,
    erase: Float[Array, "B T H"] | Float[Array, "B T H K"],
    write: Float[Array, "B T H"],
    log_decay: Float[Array, " H"] | Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Output in v's dtype and final state in float32.

    q, k: of G heads, each shared by H / G value heads in a row. erase: b, per token or per channel of the key.
    write: w. log_decay: g, at most 0; None, constant per value head, per token, or per token and channel.
    state: belongs to the row's first document; None starts at zero. segments: document ids, 0 is padding.
    scale: multiplies q; K**-0.5 by default. Raises ValueError where shapes disagree.
    """
    op = "delta_rule"
    b, t, groups, width = q.shape
    heads, values = v.shape[2:]
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == q.shape, f"k has shape {k.shape}; it must be q's {q.shape}")
    require(op, v.shape[:2] == (b, t), f"v has shape {v.shape}; it must begin with {(b, t)}")
    require(op, heads % groups == 0, f"v has {heads} heads; it needs a multiple of q's {groups}")
    tokens, channels = (b, t, heads), (b, t, heads, width)
    require(op, erase.shape in (tokens, channels), f"erase has shape {erase.shape}; it must be {tokens} or {channels}")
    require(op, write.shape == tokens, f"write has shape {write.shape}; it must be {tokens}")
    log_decay = broadcast_decay(op, log_decay, channels)
    wanted = (b, heads, width, values)
    if state is None:
        state = jnp.zeros(wanted, jnp.float32)
    require(op, state.shape == wanted, f"state has shape {state.shape}; it must be {wanted}")
    docs = None if segment_ids is None else index_documents(segment_ids)
    erase = erase if erase.shape == channels else erase[..., None]
    scale = width**-0.5 if scale is None else scale
    return call_implementation(
        op, IMPLEMENTATIONS, implementation, q, k, v, erase, write[..., None], log_decay, state, docs, scale
    )


def delta_rule_step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
    active: Bool[Array, " B"],
    *,
    erase: Float[Array, "B H"] | Float[Array, "B H K"],
    write: Float[Array, "B H"],
    log_decay: Float[Array, " H"] | Float[Array, "B H"] | Float[Array, "B H K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of the same recurrence; inactive rows keep their state and output 0."""
    share = v.shape[1] // q.shape[1]
    wide = state.dtype
    q, k = (jnp.repeat(x.astype(wide), share, axis=1) for x in (q, k))
    erase = k * (erase if erase.ndim == 3 else erase[..., None]).astype(wide)
    decayed = state if log_decay is None else step_decay_factor(log_decay, state) * state
    held = jnp.einsum("bhk,bhkv->bhv", erase, decayed)
    new = v.astype(wide) * write[..., None].astype(wide) - held
    state = jnp.where(active[:, None, None, None], decayed + k[..., None] * new[..., None, :], state)
    out = jnp.einsum("bhk,bhkv->bhv", q * (q.shape[-1] ** -0.5 if scale is None else scale), state)
    return jnp.where(active[:, None, None], out, 0).astype(v.dtype), state
