"""Normalized linear attention with the second-order Taylor kernel (BASED).

    y_i = sum_{j<=i} f(s_ij) v_j / sum_{j<=i} f(s_ij)      f(s) = 1 + s + s^2/2,  s_ij = q_i.k_j / sqrt(K)

f is at least 1/2, so the denominator is at least half the number of tokens and needs no epsilon. State: F x V + F
float32 per head, with F = 153 features at K = 16 (273 with the full expansion). It is always float32: in bfloat16 the
token count in z saturates at 256. Source: Arora et al. 2024 (BASED, arXiv 2402.18668), section 4.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernel, lazy_kernels, require
from recallax.pallas_kernels.taylor_attention import reference, xla
from recallax.pallas_kernels.taylor_attention.reference import TaylorAttentionArgs

__all__ = [
    "FEATURE_MAPS",
    "IMPLEMENTATIONS",
    "STEP_IMPLEMENTATIONS",
    "TaylorFeatures",
    "TaylorState",
    "num_features",
    "taylor_attention",
    "taylor_attention_step",
]

IMPLEMENTATIONS = {
    "reference": reference.taylor_attention,
    "xla": xla.taylor_attention,
    **lazy_kernels("taylor_attention", "mosaic_gpu", "mosaic_tpu"),
}
STEP_IMPLEMENTATIONS = {
    "xla": xla.add_and_read,
    "mosaic_gpu": lazy_kernel("taylor_attention.mosaic_gpu.taylor_step", "add_and_read"),
}
FEATURE_MAPS = {"symmetric": feature_maps.taylor, "full": feature_maps.taylor_full}
"""Feature map of each expansion."""

type TaylorFeatures = Literal["symmetric", "full"]
"""Expansion of the state: each product of two channels once, or the full outer product. Outputs are equal."""


class TaylorState(NamedTuple):
    """Sums over the tokens of a document so far; F features."""

    kv: Float[Array, "B H F V"]
    """Sum of phi(k) v^T."""
    z: Float[Array, "B H F"]
    """Sum of phi(k)."""


def num_features(head_dim: int, features: TaylorFeatures) -> int:
    """Return the number of features F of the state.

    Args:
        head_dim: Width K of queries and keys.
        features: The expansion.

    Examples:
        >>> num_features(16, "symmetric"), num_features(16, "full")
        (153, 273)
    """
    return 1 + head_dim + (head_dim * (head_dim + 1) // 2 if features == "symmetric" else head_dim * head_dim)


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *,
    state: TaylorState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    features: TaylorFeatures = "symmetric",
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], TaylorState]:
    """Compute BASED's attention over whole rows.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        state: State before the row, which belongs to its first document; None: zeros.
        segment_ids: Document ids; 0 is padding. None: one document per row.
        features: The expansion of the state.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Normalized output in v's dtype and final state in float32.

    Raises:
        ValueError: Shapes do not match.
    """
    op = "taylor_attention"
    b, t, h, width = q.shape
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == q.shape, f"k has shape {k.shape}; it must be q's {q.shape}")
    require(op, v.shape[:3] == (b, t, h), f"v has shape {v.shape}; it must begin with {(b, t, h)}")
    if state is not None:
        shape = (b, h, num_features(width, features), v.shape[-1])
        require(op, state.kv.shape == shape, f"state.kv has shape {state.kv.shape}; it must be {shape}")
        require(op, state.z.shape == shape[:3], f"state.z has shape {state.z.shape}; it must be {shape[:3]}")
    # Queries and keys are both divided by K^(1/4), so the features need no scale. The sums of a last column of ones are
    # the denominators.
    q, k = q * jnp.asarray(width**-0.25, q.dtype), k * jnp.asarray(width**-0.25, k.dtype)
    ones = jnp.ones_like(v[..., :1])
    packed = None if state is None else jnp.concatenate([state.kv, state.z[..., None]], axis=-1)
    docs = None if segment_ids is None else index_documents(segment_ids)
    v_and_ones = jnp.concatenate([v, ones], axis=-1)
    args = TaylorAttentionArgs(q, k, v_and_ones, packed, docs, FEATURE_MAPS[features])
    sums, packed = call_implementation(op, IMPLEMENTATIONS, implementation, args)
    return _normalize(sums).astype(v.dtype), TaylorState(packed[..., :-1], packed[..., -1])


def taylor_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    state: TaylorState,
    active: Bool[Array, " B"],
    *,
    features: TaylorFeatures = "symmetric",
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], TaylorState]:
    """Compute one token of `taylor_attention`.

    Args:
        q: Query of each row.
        k: Key of each row.
        v: Value of each row.
        state: State before the token.
        active: Rows that have a token; the others keep their state and output 0.
        features: The expansion of the state.
        implementation: Name of an entry of `STEP_IMPLEMENTATIONS`; None selects one for the device.

    Returns:
        Normalized output in v's dtype and state after the token.
    """
    scale, expand = q.shape[-1] ** -0.25, FEATURE_MAPS[features]
    phi_q, phi_k = expand(q.astype(jnp.float32) * scale), expand(k.astype(jnp.float32) * scale)
    # Inactive rows add 0 to the state.
    phi_k = jnp.where(active[:, None, None], phi_k, 0)
    values = jnp.where(active[:, None, None], v.astype(jnp.float32), 0)
    sums, kv = call_implementation(
        "taylor_attention_step", STEP_IMPLEMENTATIONS, implementation, phi_q, phi_k, values, state.kv
    )
    z = state.z + phi_k
    sums = jnp.concatenate([sums, jnp.einsum("bhf,bhf->bh", phi_q, z)[..., None]], axis=-1)
    return jnp.where(active[:, None, None], _normalize(sums), 0).astype(v.dtype), TaylorState(kv, z)


def _normalize(sums: Float[Array, "... W"]) -> Float[Array, "... V"]:
    total = sums[..., -1:]
    return sums[..., :-1] / jnp.where(total > 0, total, 1)  # 0 at padding before the first token
