"""BASED in XLA: polynomial scores within a chunk, features for the carried state only."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from recallax.pallas_kernels.chunked_linear_attention import SimilarityKernel, chunked_linear_attention
from recallax.pallas_kernels.feature_maps import taylor_score
from recallax.pallas_kernels.taylor_attention.reference import TaylorAttentionArgs

CHUNK = 256
"""Tokens of a chunk. Longer than for linear attention: in shorter rows, scores cost less than features per token."""


def taylor_attention(args: TaylorAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Compute the unnormalised sums in chunks.

    The arguments and the result are those of `taylor_attention.reference.taylor_attention`.
    """
    q, k, v, state, document_ids, feature_map = args
    kernel = SimilarityKernel(taylor_score, feature_map)
    return chunked_linear_attention(q, k, v, None, state, document_ids, kernel=kernel, chunk_size=CHUNK)


def add_and_read(
    q: Float[Array, "B H F"], k: Float[Array, "B H F"], v: Float[Array, "B H V"], kv: Float[Array, "B H F V"]
) -> tuple[Float[Array, "B H V"], Float[Array, "B H F V"]]:
    """One token: add k v^T to the state and read it with the features q; all float32.

    Args:
        q: Features of the query.
        k: Features of the key.
        v: Value.
        kv: State before the token.

    Returns:
        Unnormalised output and state after the token.
    """
    kv = kv + k[..., None] * v[..., None, :]
    return jnp.einsum("bhf,bhfv->bhv", q, kv), kv
