"""Causal softmax attention over all earlier tokens, with grouped queries, rotary positions and a key/value cache.

State: keys and values of all earlier tokens, 2 T G K elements in the compute dtype (one slot per position).
Sources: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; grouped queries Ainslie et al. 2023 (arXiv 2305.13245).
"""

from dataclasses import dataclass

from recallax.layers.softmax_attention import SoftmaxAttentionConfig


@dataclass(frozen=True, kw_only=True)
class Attention(SoftmaxAttentionConfig):
    """Causal softmax attention over all earlier tokens."""

    @property
    def visible_tokens(self) -> None:
        return None
