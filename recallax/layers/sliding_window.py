"""Causal softmax attention over the last `window` tokens, including the current one.

State: a ring buffer of the window, 2 w G K elements in the compute dtype (fewer if the context is shorter).
Source: Beltagy et al. 2020 (Longformer, arXiv 2004.05150), section 3.1; as used in BASED (arXiv 2402.18668), where
`window_size` 256 in the released configs means 128 earlier tokens and the current one, `window=129` here.
"""

from dataclasses import dataclass

from recallax.config import require_at_least
from recallax.layers.softmax_attention import SoftmaxAttentionConfig


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(SoftmaxAttentionConfig):
    """Causal softmax attention over the last `window` tokens."""

    window: int = 64
    """Number of tokens in the window, including the current one."""

    def __post_init__(self) -> None:
        require_at_least(1, window=self.window)

    @property
    def visible_tokens(self) -> int:
        return self.window
