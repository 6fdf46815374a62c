"""Causal softmax attention over all earlier tokens or a sliding window, which respects document boundaries.

    y_i = sum_{i-w < j <= i} softmax_j(scale * q_i.k_j) v_j

A window of w tokens includes the token itself. State: the keys and values of the last w tokens (`KVCache`).
Grouped queries: H query heads share G key/value heads, G dividing H (Ainslie et al. 2023, arXiv 2305.13245).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernels, require
from recallax.pallas_kernels.grouped_heads import check_grouped_queries
from recallax.pallas_kernels.kv_cache import (
    KVCache,
    PersistentKV,
    cached_positions,
    prepend_persistent,
    update_kv_cache,
    update_kv_cache_step,
)
from recallax.pallas_kernels.window_attention import xla
from recallax.pallas_kernels.window_attention.reference import WindowAttentionArgs

__all__ = [
    "IMPLEMENTATIONS",
    "KVCache",
    "PersistentKV",
    "masked_attention",
    "window_attention",
    "window_attention_step",
]

IMPLEMENTATIONS = {
    "reference": xla.dense,
    "xla": xla.blockwise,
    **lazy_kernels("window_attention", "cudnn", "splash"),
}


def window_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    window: int | None = None,
    state: KVCache | None = None,
    persistent: PersistentKV | None = None,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], KVCache | None]:
    """Compute attention over whole rows.

    Args:
        q: Queries of H heads, which share G key/value heads.
        k: Keys.
        v: Values.
        window: Tokens that a query sees, itself included; None: all earlier tokens.
        state: Cache of the tokens before the row, which belong to its first document; None: no tokens.
        persistent: Keys and values that every query sees in addition.
        positions: Positions within documents; required with a state. The first position of a row is the number of
            tokens in its cache.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        scale: Factor of q; None: K**-0.5.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Output in v's dtype, and the cache after these tokens (None without a state).

    Raises:
        ValueError: Shapes do not match, or a state is given without positions.

    Examples:
        >>> import jax
        >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 6, 2, 4)) for i in range(3))
        >>> out, _ = window_attention(q, k, v, window=1)  # each token sees itself only
        >>> bool(jnp.allclose(out, v, atol=1e-6))
        True
    """
    op = "window_attention"
    check_grouped_queries(op, q, k, v)
    b, t, _, width = q.shape
    require(op, window is None or window >= 1, f"window is {window}; it must be at least 1")
    require(op, state is None or positions is not None, "a state requires positions")
    if persistent is not None:
        shape = persistent.k.shape
        require(
            op,
            shape[1:] == (k.shape[2], width),
            f"persistent keys have shape {shape}; it must be [P, {k.shape[2]}, {width}]",
        )
    docs = None if segment_ids is None else index_documents(segment_ids)
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    cached = (None, None) if state is None else (state, positions)
    args = WindowAttentionArgs(q, k, v, docs, window, persistent, *cached)
    out = call_implementation(op, IMPLEMENTATIONS, implementation, args).astype(v.dtype)
    if state is None or positions is None:
        return out, None
    return out, update_kv_cache(
        state, k, v, positions, jnp.ones((b, t), jnp.int32) if segment_ids is None else segment_ids
    )


def window_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B G V"],
    state: KVCache,
    position: Int[Array, " B"],
    active: Bool[Array, " B"],
    *,
    window: int | None = None,
    persistent: PersistentKV | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], KVCache]:
    """Compute one token of `window_attention`.

    Args:
        q: Query of each row.
        k: Key of each row.
        v: Value of each row.
        state: Cache before the token.
        position: Position of the token within its document.
        active: Rows that have a token; the others keep their cache and output 0.
        window: Tokens that the query sees, itself included; None: all earlier tokens.
        persistent: Keys and values that every query sees in addition.
        scale: Factor of q; None: K**-0.5.

    Returns:
        Output in v's dtype and cache after the token.
    """
    state = update_kv_cache_step(state, k, v, position, active)
    slot_positions = cached_positions(position + 1, state.k.shape[1])
    visible = (slot_positions >= 0) & active[:, None]
    if window is not None:
        visible &= position[:, None] - slot_positions < window
    parts = [xla.VisibleKV(state.k, state.v, visible)]
    if persistent is not None:
        always_visible = jnp.ones((1, len(persistent.k)), bool)
        parts.append(xla.VisibleKV(persistent.k[None], persistent.v[None], always_visible))
    out = xla.attend_one_query(q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype), parts)
    return jnp.where(active[:, None, None], out, 0).astype(v.dtype), state


def masked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible: Bool[Array, "B T S"],
    *,
    persistent: PersistentKV | None = None,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Compute softmax attention with an explicit mask, all pairs at once, for a few hundred tokens.

    Args:
        q: Queries of H heads, which share G key/value heads.
        k: Keys.
        v: Values.
        visible: True where a query sees a key.
        persistent: Keys and values that every query sees in addition.
        scale: Factor of q; None: K**-0.5.

    Returns:
        Output in v's dtype; 0 where a query sees no key.

    Raises:
        ValueError: Shapes do not match.
    """
    op = "masked_attention"
    check_grouped_queries(op, q, k, v, same_length=False)
    mask_shape = (*q.shape[:2], k.shape[1])
    require(op, visible.shape == mask_shape, f"visible has shape {visible.shape}; it must be {mask_shape}")
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    return xla.attend(q, *prepend_persistent(persistent, k, v, visible)).astype(v.dtype)
