"""Linear attention in XLA: chunks of the sequence with a carried state."""

from jaxtyping import Array, Float

from recallax.pallas_kernels.chunked_linear_attention import SimilarityKernel, chunked_linear_attention
from recallax.pallas_kernels.feature_maps import identity
from recallax.pallas_kernels.grouped_heads import repeat_heads
from recallax.pallas_kernels.linear_attention.reference import LinearAttentionArgs

IDENTITY_KERNEL = SimilarityKernel(identity, identity)
CHUNK = 64
"""Tokens of a chunk."""
CHANNEL_CHUNK = 32
"""Tokens of a chunk with a decay per channel, whose scores cost more per pair of tokens."""


def linear_attention(args: LinearAttentionArgs) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """Compute linear attention in chunks.

    The arguments and the result are those of `linear_attention.reference.linear_attention`.
    """
    q, k, v, log_decay, state, document_ids, scale = args
    per_channel = log_decay is not None and log_decay.shape[-1] > 1
    q, k = repeat_heads(q, k, v.shape[2], scale)
    chunk = min(CHUNK, CHANNEL_CHUNK) if per_channel else CHUNK
    return chunked_linear_attention(q, k, v, log_decay, state, document_ids, kernel=IDENTITY_KERNEL, chunk_size=chunk)
