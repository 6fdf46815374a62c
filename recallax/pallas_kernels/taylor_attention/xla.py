"""BASED in chunks: the polynomial of the scores inside a chunk, features only for the carried state."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunking import DocumentIds
from recallax.pallas_kernels.feature_maps import taylor_score
from recallax.pallas_kernels.linear_attention import xla

CHUNK = 256
"""Longer than for plain linear attention: below it, scores over T keys cost less than F features per token."""


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    state: Float[Array, "B H F V"] | None,
    document_ids: DocumentIds | None,
    feature_map: Callable[[Array], Array],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Unnormalised sums in v's dtype and the final state in float32."""
    return xla.chunked_linear_attention(
        q, k, v, None, state, document_ids, kernel=xla.SimilarityKernel(taylor_score, feature_map), chunk_size=CHUNK
    )


def add_and_read(
    q: Float[Array, "B H F"], k: Float[Array, "B H F"], v: Float[Array, "B H V"], kv: Float[Array, "B H F V"]
) -> tuple[Float[Array, "B H V"], Float[Array, "B H F V"]]:
    """One token: S + k v^T, and what the features q read of it; all float32."""
    kv = kv + k[..., None] * v[..., None, :]
    return jnp.einsum("bhf,bhfv->bhv", q, kv), kv
