"""Gated delta rule: a state that erases the value stored under a key before it writes a new one (DeltaNet family).

    S_t = (I - k_t e_t^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t v_t)^T,   e_t = b_t k_t        o_t = scale * S_t^T q_t

b is the erase strength and w the write strength; both are beta in DeltaNet (no g), Gated DeltaNet (g per token) and KDA
(g per channel). The decay is applied before the erasure. With unit keys, b <= 1 removes part of the stored value and b
in (1, 2] reflects it (negative eigenvalues). State: K x V float32 per value head.

Source: Yang et al. 2024 (arXiv 2406.06484), section 3; Gated DeltaNet (arXiv 2412.06464), equation 10, whose chunked
form is printed with a wrong sign of the inverse; KDA (Kimi Linear, arXiv 2510.26692), section 3.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.decay import broadcast_decay, step_decay_factor
from recallax.pallas_kernels.delta_rule import reference, xla
from recallax.pallas_kernels.delta_rule.reference import DeltaRuleArgs
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernels, require

__all__ = ["IMPLEMENTATIONS", "delta_rule", "delta_rule_step"]

IMPLEMENTATIONS = {
    "reference": reference.delta_rule,
    "xla": xla.delta_rule,
    **lazy_kernels("delta_rule", "mosaic_gpu", "mosaic_tpu"),
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
    """Compute the gated delta rule over whole rows.

    Args:
        q: Queries of G heads, each shared by H / G consecutive value heads.
        k: Keys of G heads; the recurrence is stable for unit keys.
        v: Values.
        erase: Erase strength b, per token or per token and key channel.
        write: Write strength w per token.
        log_decay: Natural log-decay g, at most 0: constant per value head, per token, or per token and key channel.
        state: State before the row, which belongs to its first document; None: zeros.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        scale: Factor of q; None: K**-0.5.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output in v's dtype and final state in float32.

    Raises:
        ValueError: Shapes do not match.

    Examples:
        >>> key = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)  # one key, written twice
        >>> k, v = jnp.concatenate([key, key], axis=1), jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
        >>> out, _ = delta_rule(k, k, v, erase=jnp.ones((1, 2, 1)), write=jnp.ones((1, 2, 1)), scale=1.0)
        >>> out.ravel().tolist()  # the second value replaces the first
        [3.0, 5.0]
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
    state_shape = (b, heads, width, values)
    if state is None:
        state = jnp.zeros(state_shape, jnp.float32)
    require(op, state.shape == state_shape, f"state has shape {state.shape}; it must be {state_shape}")
    docs = None if segment_ids is None else index_documents(segment_ids)
    erase = erase if erase.shape == channels else erase[..., None]
    args = DeltaRuleArgs(
        q, k, v, erase, write[..., None], log_decay, state, docs, width**-0.5 if scale is None else scale
    )
    return call_implementation(op, IMPLEMENTATIONS, implementation, args)


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
    """Compute one token of `delta_rule`.

    Args:
        q: Query of each row.
        k: Key of each row.
        v: Value of each row.
        state: State before the token.
        active: Rows that have a token; the others keep their state and output 0.
        erase: Erase strength b, per head or per head and key channel.
        write: Write strength w.
        log_decay: Natural log-decay g, at most 0: per head, or per head and key channel.
        scale: Factor of q; None: K**-0.5.

    Returns:
        Output in v's dtype and state after the token.
    """
    share = v.shape[1] // q.shape[1]
    dtype = state.dtype
    q, k = (jnp.repeat(x.astype(dtype), share, axis=1) for x in (q, k))
    erase_k = k * (erase if erase.ndim == 3 else erase[..., None]).astype(dtype)
    decayed = state if log_decay is None else step_decay_factor(log_decay, state) * state
    erased = jnp.einsum("bhk,bhkv->bhv", erase_k, decayed)
    new = v.astype(dtype) * write[..., None].astype(dtype) - erased
    state = jnp.where(active[:, None, None, None], decayed + k[..., None] * new[..., None, :], state)
    out = jnp.einsum("bhk,bhkv->bhv", q * (q.shape[-1] ** -0.5 if scale is None else scale), state)
    return jnp.where(active[:, None, None], out, 0).astype(v.dtype), state
