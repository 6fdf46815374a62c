"""Sparse global attention: softmax attention over a window and up to `top_k` selected earlier tokens.

A selector scores tokens (`recallax.layers.selection`), and the queries of a block share the selected tokens. Rotary
positions are the true positions, also of selected tokens. State, by `cache`:

    top_k   keys and values of the window and of the selected tokens: constant, (2 G K + 1) (window + top_k) elements
            and one number per selected token. Exact for selectors whose scores depend on the token only, because a
            token that has left the top k never returns to it.
    full    keys, values and selection keys of all tokens, which grow with the context; for query-dependent selectors

The mixer `Landmark` is a different way to select blocks, with its own softmax.

Source: Hydra (arXiv 2508.15099): a window of 256 and up to 512 tokens selected by a controller, in every third layer.
Hydra does not specify the selection. Here blocks of 128 queries select tokens before the block starts, by a score that
is added to the logits.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError, require_at_least
from recallax.layers.attention_heads import attention_head_dim
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import Linear, residual_linear
from recallax.layers.rotary import rotary
from recallax.layers.selection import SelectorConfig, SelectorInputs, TokenScore
from recallax.layers.state_reset import reset_for_prefill, reset_for_step
from recallax.pallas_kernels.sparse_global_attention import (
    FullCache,
    SparseGlobalCache,
    TopKCache,
    init_full_cache,
    init_topk_cache,
    sparse_global_attention,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo

type GlobalCacheKind = Literal["top_k", "full"]
"""Kind of cache: of the window and the selected tokens, or of all tokens."""


@dataclass(frozen=True, kw_only=True)
class SparseGlobalAttention(MixerConfig):
    """Softmax attention over a window and selected earlier tokens (Hydra)."""

    window: int = 256
    """Number of tokens in the window, including the current one."""
    top_k: int = 512
    """Largest number of selected tokens outside the window."""
    block_size: int = 128
    """Number of queries that share the selected tokens; at most `window`."""
    selector: SelectorConfig = TokenScore()
    """Module that scores tokens."""
    cache: GlobalCacheKind = "top_k"
    """Tokens in the state: the window and the selected ones, or all."""
    num_heads: int = 1
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads, each shared by a group of query heads; None: `num_heads`."""
    head_dim: int | None = None
    """Width of a head; None: d_model / num_heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None: no positional embedding."""

    def __post_init__(self) -> None:
        require_at_least(1, window=self.window, top_k=self.top_k, block_size=self.block_size)
        if self.block_size > self.window:
            raise ConfigError(f"block_size is {self.block_size}; it must be at most the window of {self.window} tokens")

    @property
    def grid(self) -> int:
        return self.block_size

    def build(
        self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs
    ) -> "SparseGlobalAttentionMixer":
        return SparseGlobalAttentionMixer(self, d_model, layer, precision=precision, rngs=rngs)


class SparseGlobalState(NamedTuple):
    """State of `SparseGlobalAttention`."""

    cache: SparseGlobalCache
    """Keys and values of tokens that may still be read."""
    selector: State
    """State of the selector."""


class SparseGlobalAttentionMixer(RecurrentMixer):
    """Projections, selector, rotary positions and the op."""

    def __init__(
        self, config: SparseGlobalAttention, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs
    ):
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim = attention_head_dim(
            "sparse global attention",
            d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
        )
        self.window, self.top_k, self.block_size = config.window, config.top_k, config.block_size
        self.rope_theta, self.cache, self.dtype = config.rope_theta, config.cache, precision.compute
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.selector = config.selector.build(d_model, q_width, kv_width, precision=precision, rngs=rngs)
        if config.cache == "top_k" and self.selector.query_dependent:
            name = type(config.selector).__name__
            raise ConfigError(
                f"cache is 'top_k', but {name} may select a token that the cache has dropped; use cache='full'"
            )
        self.out = residual_linear(q_width, d_model, layer.num_layers, in_axis="heads", precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _, _, aux = self._attend(x, seq, None, self.selector.init_state(x.shape[0]))
        return y, aux

    def init_state(self, batch: int, max_len: int) -> SparseGlobalState:
        sizes = (self.num_kv_heads, self.head_dim, self.head_dim, self.selector.score_dim)
        if self.cache == "full":
            cache = init_full_cache(batch, max_len, *sizes, self.selector.query_dependent, self.dtype)
        else:
            window, top_k = min(self.window, max_len), min(self.top_k, max_len)
            cache = init_topk_cache(batch, window, top_k, *sizes, self.dtype)
        return SparseGlobalState(cache, self.selector.init_state(batch))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: SparseGlobalState
    ) -> tuple[Float[Array, "B T D"], SparseGlobalState, Aux]:
        cache, selector = reset_for_prefill(state, seq)
        y, cache, selector, aux = self._attend(x, seq, cache, selector)
        assert isinstance(cache, FullCache | TopKCache)
        return y, SparseGlobalState(cache, selector), aux

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: SparseGlobalState
    ) -> tuple[Float[Array, "B D"], SparseGlobalState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        y, state, _ = self.prefill(x[:, None], seq, reset_for_step(state, info))
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _attend(
        self, x: Float[Array, "B T D"], seq: SeqInfo, cache: SparseGlobalCache | None, selector: State
    ) -> tuple[Float[Array, "B T D"], SparseGlobalCache | None, State, Aux]:
        positions = jnp.asarray(seq.positions)
        q, k, v = (part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.q, self.k, self.v))
        scores, selector, aux = self.selector(SelectorInputs(x, q, k, seq), selector)
        if self.rope_theta is not None:
            q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        y, cache = sparse_global_attention(
            q,
            k,
            v,
            *scores,
            window=self.window,
            top_k=self.top_k,
            block_size=self.block_size,
            positions=positions,
            segment_ids=jnp.asarray(seq.segment_ids),
            state=cache,
            score_bias=self.selector.bias_logits,
        )
        return self.out(y.reshape(*x.shape[:2], -1)), cache, selector, aux
