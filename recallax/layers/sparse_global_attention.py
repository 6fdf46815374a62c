"""Sparse global attention: softmax attention over a window and up to `chosen` tokens of all that lie before it.

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

from recallax.config import ConfigError
from recallax.layers.base import MixerConfig, RecurrentMixer, Site, State
from recallax.layers.continuation import continued, divide_heads, started
from recallax.layers.dense import Linear, residual_std
from recallax.layers.rotary import rotary
from recallax.layers.selection import SelectorConfig, TokenScore
from recallax.pallas_kernels.sparse_global_attention import (
    EveryToken,
    GlobalHeap,
    Held,
    empty_heap,
    empty_tokens,
    sparse_global_attention,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo

type Cache = Literal["heap", "every token"]


@dataclass(frozen=True, kw_only=True)
class SparseGlobalAttention(MixerConfig):
    """See the head of the file."""

    window: int = 256
    """Tokens that a query sees in any case, itself included."""
    chosen: int = 512
    """Tokens that a block of queries sees besides, at most."""
    block: int = 128
    """Queries that share what is chosen; at most the window."""
    selector: SelectorConfig = TokenScore()
    cache: Cache = "heap"
    heads: int = 1
    kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = None
    """Width of a head; None is d_model / heads."""
    rotary_base: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""

    def __post_init__(self) -> None:
        for name in ("window", "chosen", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1 token")
        if self.block > self.window:
            raise ConfigError(f"block is {self.block}; it must be at most the window of {self.window} tokens")

    @property
    def grid(self) -> int:
        return self.block

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "SparseGlobalAttentionMixer":
        return SparseGlobalAttentionMixer(self, d_model, site, precision=precision, rngs=rngs)


class SparseGlobalState(NamedTuple):
    """What may be read, and what the selector needs of earlier tokens."""

    held: Held
    selector: State


class SparseGlobalAttentionMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(
        self, config: SparseGlobalAttention, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs
    ):
        if config.head_dim is not None and config.head_dim < 1:
            raise ConfigError(f"head_dim is {config.head_dim}; it must be at least 1 (or None for d_model / heads)")
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.width = config.head_dim or divide_heads("sparse global attention", d_model, self.heads)
        divide_heads("its query heads over key/value heads", self.heads, self.kv_heads)
        if config.rotary_base is not None and self.width % 2:
            raise ConfigError(f"a head is {self.width} wide; rotary positions need an even width (or rotary_base=None)")
        self.window, self.chosen, self.block = config.window, config.chosen, config.block
        self.base, self.cache, self.dtype = config.rotary_base, config.cache, precision.compute
        q_width, kv_width = self.heads * self.width, self.kv_heads * self.width
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.selector = config.selector.build(d_model, q_width, kv_width, precision=precision, rngs=rngs)
        if config.cache == "heap" and self.selector.asks:
            raise ConfigError(
                f"cache is 'heap', but {type(config.selector).__name__} may want a token back that was dropped; "
                f"use cache='every token'"
            )
        std = residual_std(site.depth)
        self.out = Linear(q_width, d_model, precision=precision, rngs=rngs, std=std, axes=("heads", "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        y, _, _, aux = self._attend(x, seq, None, self.selector.init_state(x.shape[0]))
        return y, aux

    def init_state(self, batch: int, max_len: int) -> SparseGlobalState:
        selector = self.selector.init_state(batch)
        window, sizes = min(self.window, max_len), (self.kv_heads, self.width, self.width, self.selector.offers)
        if self.cache == "every token":
            return SparseGlobalState(empty_tokens(batch, max_len, *sizes, self.selector.asks, self.dtype), selector)
        return SparseGlobalState(empty_heap(batch, window, min(self.chosen, max_len), *sizes, self.dtype), selector)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: SparseGlobalState
    ) -> tuple[Float[Array, "B T D"], SparseGlobalState, Aux]:
        held, selector = continued(state, seq)
        y, held, selector, aux = self._attend(x, seq, held, selector)
        assert isinstance(held, EveryToken | GlobalHeap)
        return y, SparseGlobalState(held, selector), aux

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: SparseGlobalState
    ) -> tuple[Float[Array, "B D"], SparseGlobalState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        y, state, _ = self.prefill(x[:, None], seq, started(state, info))
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _attend(
        self, x: Float[Array, "B T D"], seq: SeqInfo, held: Held | None, selector: State
    ) -> tuple[Float[Array, "B T D"], Held | None, State, Aux]:
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        q, k, v = (part(x).reshape(*x.shape[:2], -1, self.width) for part in (self.q, self.k, self.v))
        wanted, selector, aux = self.selector(x, q, k, seq, selector)
        if self.base is not None:
            q, k = rotary(q, positions, self.base), rotary(k, positions, self.base)
        y, held = sparse_global_attention(
            q,
            k,
            v,
            *wanted,
            window=self.window,
            chosen=self.chosen,
            block=self.block,
            positions=positions,
            segments=segments,
            state=held,
            weighed=self.selector.weighed,
        )
        return self.out(y.reshape(*x.shape[:2], -1)), held, selector, aux
