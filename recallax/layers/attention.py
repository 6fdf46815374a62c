"""Softmax attention over all earlier tokens: grouped queries, rotary positions, key/value cache.

State: keys and values of every token so far, 2 T G K elements in the compute dtype (a slot per position).
Sources: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2; grouped queries Ainslie et al. 2023 (arXiv 2305.13245).
"""

from dataclasses import dataclass

from flax import nnx

from recallax.config import added
from recallax.layers.base import MixerConfig, Site
from recallax.layers.softmax import SoftmaxMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class Attention(MixerConfig):
    """Causal softmax attention."""

    heads: int = 1
    kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = added(None)
    """Width of a head; None is d_model / heads."""
    rotary_base: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""
    persistent: int = added(0)
    """Learned tokens without a position that every token sees besides (Titans, arXiv 2501.00663, section 3.3)."""

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> SoftmaxMixer:
        return SoftmaxMixer(
            d_model,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim,
            window=None,
            rotary_base=self.rotary_base,
            persistent=self.persistent,
            depth=site.depth,
            precision=precision,
            rngs=rngs,
        )
