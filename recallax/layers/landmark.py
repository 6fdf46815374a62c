"""Landmark attention: softmax attention whose past is opened block by block, by a landmark token per block.

The language model inserts a landmark after every `landmark_every` tokens of a document and drops its output; to this
mixer a landmark is the token at each position p with p % (landmark_every + 1) = landmark_every. It is trained on the
whole grouped softmax. With `top_k`, prefill and step read the k blocks that the landmarks choose, which is another
function unless k covers all blocks.

State: keys and values of every token so far by blocks, (2 landmark_every + 1) G K elements a block in the compute
dtype. Keys are turned to their place in the block only, so that a block can be read at any distance.
Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import MixerConfig, RecurrentMixer, Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, residual_std
from recallax.layers.rotary import rotary
from recallax.pallas_kernels.landmark_attention import (
    Distances,
    LandmarkCache,
    Per,
    Retrieval,
    Taken,
    begin,
    continued_blocks,
    empty_cache,
    extended,
    finish,
    landmark_attention,
    look,
    read,
    read_all,
    retrieve,
    retrieve_step,
    turned_home,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class Landmark(MixerConfig):
    """See the head of the file."""

    landmark_every: int = 63
    """Tokens of a block besides its landmark; the paper's blocks have 50, its kernels' 63."""
    heads: int = 1
    kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = None
    """Width of a head; None is d_model / heads."""
    rotary_base: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""
    top_k: int | None = None
    """Past blocks that prefill and step read; None is all of them."""
    per: Per = "head and token"
    """Who chooses blocks of its own."""
    distances: Distances = "stingy"
    """How far away retrieved blocks seem to be: `stingy` never exceeds top_k + 2 blocks."""
    min_probability: float = 0.0
    """Of a landmark among all earlier ones, for its block to be read (appendix D has 0.3)."""

    def __post_init__(self) -> None:
        for name, value in (("landmark_every", self.landmark_every), ("top_k", self.top_k)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.min_probability <= 1:
            raise ConfigError(f"min_probability is {self.min_probability}; it must be from 0 to 1")

    @property
    def landmarks(self) -> int:
        return self.landmark_every

    @property
    def retrieval(self) -> Retrieval | None:
        """None reads all blocks."""
        if self.top_k is None:
            return None
        return Retrieval(top_k=self.top_k, per=self.per, distances=self.distances, min_probability=self.min_probability)

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "LandmarkMixer":
        return LandmarkMixer(self, d_model, site, precision=precision, rngs=rngs)


class LandmarkState(NamedTuple):
    """The blocks, and what each head's blocks are chosen by where that outlasts a token."""

    cache: LandmarkCache
    best: Float[Array, "B H N"] | None
    """Largest log-probability of each block over the tokens of the unfinished one; 0 where there is none."""


class Looked(NamedTuple):
    """Tokens projected, and the blocks that they want to read (`retrieval.Chosen`)."""

    q: Float[Array, "B C H K"]
    """Scaled, not turned."""
    k: Float[Array, "B C G K"]
    """Turned to the place in the block."""
    v: Float[Array, "B C G K"]
    positions: Int[Array, "B C"]
    index: Int[Array, "B C X N"]
    distance: Int[Array, "B C X N"]


class LandmarkMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: Landmark, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        if config.head_dim is not None and config.head_dim < 1:
            raise ConfigError(f"head_dim is {config.head_dim}; it must be at least 1 (or None for d_model / heads)")
        self.width = config.head_dim or divide_heads("landmark attention", d_model, self.heads)
        divide_heads("landmark attention's query heads over key/value heads", self.heads, self.kv_heads)
        if config.rotary_base is not None and self.width % 2:
            raise ConfigError(f"a head is {self.width} wide; rotary positions need an even width (or rotary_base=None)")
        self.real, self.base, self.retrieval = config.landmark_every, config.rotary_base, config.retrieval
        self.dtype = precision.compute
        q_width, kv_width = self.heads * self.width, self.kv_heads * self.width
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        std = residual_std(site.depth)
        self.out = Linear(q_width, d_model, precision=precision, rngs=rngs, std=std, axes=("heads", "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        positions, (q, k, v) = jnp.asarray(seq.positions), self.project(x)
        y = landmark_attention(
            self._at(q, positions),
            self._at(k, positions),
            v,
            real=self.real,
            positions=positions,
            segments=jnp.asarray(seq.segments),
        )
        return self.out(y.reshape(*x.shape[:-1], -1)), {}

    def init_state(self, batch: int, max_len: int) -> LandmarkState:
        cache = empty_cache(batch, max_len, self.real, self.kv_heads, self.width, self.dtype)
        chosen_over_time = self.retrieval is not None and self.retrieval.per == "head"
        best = jnp.zeros((batch, self.heads, cache.marks.shape[1])) if chosen_over_time else None
        return LandmarkState(cache, best)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: LandmarkState
    ) -> tuple[Float[Array, "B T D"], LandmarkState, Aux]:
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        q, k, v = self.project(x)
        placed, best = self._at(k, positions % (self.real + 1)), state.best
        if self.retrieval is None:
            blocks = continued_blocks(placed, v, segments, positions, state.cache)
            y = landmark_attention(
                self._at(q, positions),
                self._at(k, positions),
                v,
                real=self.real,
                positions=positions,
                segments=segments,
                past=turned_home(state.cache, positions[:, 0], self.turn),
            )
        else:
            y, blocks, best = retrieve(
                self.scaled(q), placed, v, segments, positions, state.cache, best, self.retrieval, self.turn
            )
        cache, best = extended(state.cache, state.best, blocks, best, placed, v, segments, positions)
        return self.out(y.astype(v.dtype).reshape(*x.shape[:-1], -1)), LandmarkState(cache, best), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: LandmarkState
    ) -> tuple[Float[Array, "B D"], LandmarkState]:
        position, active = jnp.asarray(info.position), jnp.asarray(info.active)
        q, k, v = (part[:, 0] for part in self.project(x[:, None]))
        k = self._at(k[:, None], position[:, None] % (self.real + 1))[:, 0]
        cache, best = begin(state.cache, k, v, position, active), state.best
        if self.retrieval is None:
            y = read_all(self.scaled(q), cache, position, self.turn)
        else:
            y, best = retrieve_step(self.scaled(q), cache, position, active, best, self.retrieval, self.turn)
        y = self.out(y.astype(v.dtype).reshape(*x.shape[:-1], -1))
        return jnp.where(active[:, None], y, 0), LandmarkState(finish(cache, k, position, active), best)

    def look(
        self, x: Float[Array, "B C D"], first: Int[Array, ""], marks: Float[Array, "B N G K"], best: Array | None
    ) -> tuple[Looked, Array | None]:
        """What C tokens of one block project to and want to read, the block's first one at position `first` or before;
        for readers that keep blocks elsewhere. `best` as in `LandmarkState`."""
        rows, count = x.shape[0], marks.shape[1]
        assert self.retrieval is not None
        positions = jnp.broadcast_to(first + jnp.arange(x.shape[1])[None], x.shape[:2])
        q, k, v = self.project(x)
        number = jnp.broadcast_to(jnp.arange(count)[None], (rows, count))
        visible = number[:, None] < positions[:, :, None] // (self.real + 1)
        q = self.scaled(q)
        chosen, best = look(q, marks, number, visible, positions, self.real, best, self.retrieval, self.turn)
        return Looked(q, self._at(k, positions % (self.real + 1)), v, positions, *chosen), best

    def read_taken(
        self, looked: Looked, taken: Taken, held: Bool[Array, "B C X N"], own_k: Array, own_v: Array
    ) -> Float[Array, "B C D"]:
        """The output, given the blocks and the own block's keys and values, these tokens' among them."""
        place = looked.positions % (self.real + 1)
        seen = jnp.arange(self.real)[None, None] <= place[:, :, None]
        y = read(looked.q, taken, held, looked.distance, own_k, own_v, seen, place, self.turn)
        return self.out(y.astype(looked.v.dtype).reshape(*y.shape[:2], -1))

    def project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Queries, keys and values, not turned yet."""
        q, k, v = (part(x).reshape(*x.shape[:-1], -1, self.width) for part in (self.q, self.k, self.v))
        return q, k, v

    def scaled(self, q: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """Queries by K^-0.5, as the parts of the op take them."""
        return q * jnp.asarray(self.width**-0.5, q.dtype)

    @property
    def turn(self):
        """Turns vectors by distances."""
        return partial(_turn, self.base)

    def _at(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        return x if self.base is None else rotary(x, positions, self.base)


def _turn(base: float | None, x: Float[Array, "... K"], distance: Int[Array, "..."]) -> Float[Array, "... K"]:
    if base is None:
        return x
    return rotary(x.reshape(1, -1, 1, x.shape[-1]), distance.reshape(1, -1), base).reshape(x.shape)
