"""Sparse global attention: softmax attention over a window and up to `top_k` tokens of all that lie before it.

A selector scores tokens (`layers/selection.py`), and blocks of queries share what is chosen; the op says how. Rotary
positions are the true ones, for chosen tokens too. State, as `cache` says:

    heap           keys and values of the window and of the chosen tokens: a constant, (2 G K + 1) (window + chosen)
                   elements and a number per chosen token. For selectors whose scores depend on the token alone it is
                   exact: what has left the best never comes back.
    every token    keys, values and offers of all tokens, which grow with them: for selectors that ask

Landmark blocks are a third way of choosing, with a softmax of their own: the mixer `Landmark` in this one's place.

Source: Hydra (arXiv 2508.15099): window 256, up to 512 tokens chosen by a controller, in every third block. How it
chooses is not said; here before the block of queries begins, in blocks of 128, by a score that enters the logits.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer, State
from recallax.layers.dense import Linear, residual_std
from recallax.layers.rotary import rotary
from recallax.layers.selection import SelectorConfig, TokenScore
from recallax.layers.state_reset import head_dim_of, reset_for_prefill, reset_for_step
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


@dataclass(frozen=True, kw_only=True)
class SparseGlobalAttention(MixerConfig):
    """See the head of the file."""

    window: int = 256
    """Tokens that a query sees in any case, itself included."""
    top_k: int = 512
    """Tokens that a block of queries sees besides, at most."""
    block_size: int = 128
    """Queries that share what is chosen; at most the window."""
    selector: SelectorConfig = TokenScore()
    cache: GlobalCacheKind = "top_k"
    num_heads: int = 1
    num_kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = None
    """Width of a head; None is d_model / heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""

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
    """What may be read, and what the selector needs of earlier tokens."""

    cache: SparseGlobalCache
    selector: State


class SparseGlobalAttentionMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(
        self, config: SparseGlobalAttention, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs
    ):
        if config.head_dim is not None and config.head_dim < 1:
            raise ConfigError(f"head_dim is {config.head_dim}; it must be at least 1 (or None for d_model / heads)")
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or head_dim_of("sparse global attention", d_model, self.num_heads)
        head_dim_of("its query heads over key/value heads", self.num_heads, self.num_kv_heads)
        if config.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(
                f"a head is {self.head_dim} wide; rotary positions need an even width (or rotary_base=None)"
            )
        self.window, self.top_k, self.block_size = config.window, config.top_k, config.block_size
        self.rope_theta, self.cache, self.dtype = config.rope_theta, config.cache, precision.compute
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.selector = config.selector.build(d_model, q_width, kv_width, precision=precision, rngs=rngs)
        if config.cache == "top_k" and self.selector.query_dependent:
            raise ConfigError(
                f"cache is 'heap', but {type(config.selector).__name__} may want a token back that was dropped; "
                f"use cache='every token'"
            )
        std = residual_std(layer.num_layers)
        self.out = Linear(q_width, d_model, precision=precision, rngs=rngs, std=std, axes=("heads", "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _, _, aux = self._attend(x, seq, None, self.selector.init_state(x.shape[0]))
        return y, aux

    def init_state(self, batch: int, max_len: int) -> SparseGlobalState:
        selector = self.selector.init_state(batch)
        window, sizes = (
            min(self.window, max_len),
            (self.num_kv_heads, self.head_dim, self.head_dim, self.selector.score_dim),
        )
        if self.cache == "full":
            return SparseGlobalState(
                init_full_cache(batch, max_len, *sizes, self.selector.query_dependent, self.dtype), selector
            )
        return SparseGlobalState(init_topk_cache(batch, window, min(self.top_k, max_len), *sizes, self.dtype), selector)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: SparseGlobalState
    ) -> tuple[Float[Array, "B T D"], SparseGlobalState, Aux]:
        held, selector = reset_for_prefill(state, seq)
        y, held, selector, aux = self._attend(x, seq, held, selector)
        assert isinstance(held, FullCache | TopKCache)
        return y, SparseGlobalState(held, selector), aux

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
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        q, k, v = (part(x).reshape(*x.shape[:2], -1, self.head_dim) for part in (self.q, self.k, self.v))
        wanted, selector, aux = self.selector(x, q, k, seq, selector)
        if self.rope_theta is not None:
            q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
        y, cache = sparse_global_attention(
            q,
            k,
            v,
            *wanted,
            window=self.window,
            top_k=self.top_k,
            block_size=self.block_size,
            positions=positions,
            segment_ids=segments,
            state=cache,
            score_bias=self.selector.bias_logits,
        )
        return self.out(y.reshape(*x.shape[:2], -1)), cache, selector, aux
