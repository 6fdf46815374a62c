"""Causal softmax attention over the last `window` tokens, including the current one.

State: a ring buffer of the window, 2 w G K elements in the compute dtype (fewer if the context is shorter).
Source: Beltagy et al. 2020 (Longformer, arXiv 2004.05150), section 3.1; as used in BASED (arXiv 2402.18668), where
`window_size` 256 in the released configs means 128 earlier tokens and the current one, `window=129` here.
"""

from dataclasses import dataclass

from flax import nnx

from recallax.config import added_field, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(MixerConfig):
    """Causal softmax attention over the last `window` tokens."""

    window: int = 64
    """Number of tokens in the window, including the current one."""
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

    def __post_init__(self) -> None:
        require_at_least(1, window=self.window)

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
