"""Softmax attention over a sliding window of the last `window` tokens, the token itself included.

State: a ring buffer of exactly the window, 2 w G K elements in the compute dtype (fewer where the context is shorter).
Source: Beltagy et al. 2020 (Longformer, arXiv 2004.05150), section 3.1; as used in BASED (arXiv 2402.18668), where
the released configs' `window_size` 256 means 128 tokens back plus the token itself, `window=129` here.
"""

from dataclasses import dataclass

from flax import nnx

from recallax.config import ConfigError, added_field
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(MixerConfig):
    """Causal softmax attention over the last `window` tokens."""

    window: int = 64
    num_heads: int = 1
    num_kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = added_field(None)
    """Width of a head; None is d_model / heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""
    num_persistent_tokens: int = added_field(0)
    """Learned tokens without a position that every token sees besides (Titans, arXiv 2501.00663, section 3.3)."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"window is {self.window}; it must be at least 1, the token itself")

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> SoftmaxAttentionMixer:
        return SoftmaxAttentionMixer(
            d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            window=self.window,
            rope_theta=self.rope_theta,
            num_persistent_tokens=self.num_persistent_tokens,
            num_layers=layer.num_layers,
            precision=precision,
            rngs=rngs,
        )
