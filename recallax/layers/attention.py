"""Causal softmax attention over all earlier tokens, with grouped queries, rotary positions and a key/value cache.

State: keys and values of all earlier tokens, 2 T G K elements in the compute dtype (one slot per position).
Sources: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; grouped queries Ainslie et al. 2023 (arXiv 2305.13245).
"""

from dataclasses import dataclass

from flax import nnx

from recallax.config import added_field
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class Attention(MixerConfig):
    """Causal softmax attention over all earlier tokens."""

    num_heads: int = 1
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads, each shared by a group of query heads; None: `num_heads`."""
    head_dim: int | None = added_field(None)
    """Width of a head; None: d_model / num_heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None: no positional embedding."""
    num_persistent_tokens: int = added_field(0)
    """Learned key/value tokens without a position, visible to all tokens (Titans, arXiv 2501.00663, section 3.3)."""

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> SoftmaxAttentionMixer:
        return SoftmaxAttentionMixer(
            d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            window=None,
            rope_theta=self.rope_theta,
            num_persistent_tokens=self.num_persistent_tokens,
            num_layers=layer.num_layers,
            precision=precision,
            rngs=rngs,
        )
