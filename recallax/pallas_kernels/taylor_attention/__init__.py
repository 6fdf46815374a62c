"""BASED's normalised linear attention with the second-order Taylor kernel.

    y_i = sum_{j<=i} f(s_ij) v_j / sum_{j<=i} f(s_ij)      f(s) = 1 + s + s^2/2,  s_ij = q_i.k_j / sqrt(K)

f is at least 1/2, so the denominator is at least half the number of tokens and no epsilon is needed for stability.
State: F x V + F float32 per head, F = 153 features at K = 16 (273 in the full form). It is float32 always: in bfloat16
the count inside z stops at 256. Source: Arora et al. 2024 (BASED, arXiv 2402.18668), section 4.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels import feature_maps
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.dispatch import call_implementation, lazy_kernel, require
from recallax.pallas_kernels.taylor_attention import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.taylor_attention,
    "xla": xla.taylor_attention,
    "mosaic_gpu": lazy_kernel("recallax.pallas_kernels.taylor_attention.mosaic_gpu", "taylor_attention"),
    "mosaic_tpu": lazy_kernel("recallax.pallas_kernels.taylor_attention.mosaic_tpu", "taylor_attention"),
}
STEP_IMPLEMENTATIONS = {
    "xla": xla.add_and_read,
    "mosaic_gpu": lazy_kernel("recallax.pallas_kernels.taylor_attention.mosaic_gpu.taylor_step", "add_and_read"),
}
FEATURE_MAPS = {"symmetric": feature_maps.taylor, "full": feature_maps.taylor_full}

type TaylorFeatures = Literal["symmetric", "full"]
"""Which expansion the state holds: each product once, or the full outer product. The outputs are the same."""


class TaylorState(NamedTuple):
    """Sums over the tokens seen so far."""

    kv: Float[Array, "B H F V"]
    z: Float[Array, "B H F"]


def num_features(head_dim: int, features: TaylorFeatures) -> int:
    """Number of features F of the state for query and key width K."""
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
    """Normalised output in v's dtype and the final float32 state.

    state: belongs to the row's first document; None starts empty. segments: document ids, 0 is padding.
    Raises ValueError where shapes disagree.
    """
    op = "taylor_attention"
    b, t, h, width = q.shape
    require(op, t >= 1, f"q has {t} tokens; it needs at least 1")
    require(op, k.shape == q.shape, f"k has shape {k.shape}; it must be q's {q.shape}")
    require(op, v.shape[:3] == (b, t, h), f"v has shape {v.shape}; it must begin with {(b, t, h)}")
    if state is not None:
        wanted = (b, h, num_features(width, features), v.shape[-1])
        require(op, state.kv.shape == wanted, f"state.kv has shape {state.kv.shape}; it must be {wanted}")
        require(op, state.z.shape == wanted[:3], f"state.z has shape {state.z.shape}; it must be {wanted[:3]}")
    # With both sides divided by K^(1/4) the features need no scale of their own. A sum with itself in column V + 1,
    # of ones, is the denominator.
    q, k = q * jnp.asarray(width**-0.25, q.dtype), k * jnp.asarray(width**-0.25, k.dtype)
    ones = jnp.ones_like(v[..., :1])
    packed = None if state is None else jnp.concatenate([state.kv, state.z[..., None]], axis=-1)
    docs = None if segment_ids is None else index_documents(segment_ids)
    wide = jnp.concatenate([v, ones], axis=-1)
    sums, packed = call_implementation(
        op, IMPLEMENTATIONS, implementation, q, k, wide, packed, docs, FEATURE_MAPS[features]
    )
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
    """One token; inactive rows keep their state and output 0."""
    scale, expand = q.shape[-1] ** -0.25, FEATURE_MAPS[features]
    phi_q, phi_k = expand(q.astype(jnp.float32) * scale), expand(k.astype(jnp.float32) * scale)
    # What is added is 0 in inactive rows.
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
    return sums[..., :-1] / jnp.where(total > 0, total, 1)  # padding that saw no token divides by 1
