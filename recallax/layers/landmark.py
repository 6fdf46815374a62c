"""Landmark attention: softmax attention whose past is opened block by block, by a landmark token per block.

The language model inserts a landmark after every `block_size` tokens of a document and drops its output; to this
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

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, residual_std
from recallax.layers.rotary import rotary
from recallax.layers.state_reset import head_dim_of
from recallax.pallas_kernels.landmark_attention import (
    BlockRetrieval,
    GatheredBlocks,
    LandmarkCache,
    PositionMode,
    SelectionScope,
    append_to_partial_block,
    attend_all_blocks,
    attend_selected_blocks,
    cached_and_new_blocks,
    close_partial_block,
    init_landmark_cache,
    landmark_attention,
    retrieval_attention,
    retrieval_attention_step,
    rotate_cache_to_true_positions,
    select_cached_blocks,
    update_cache_and_log_probs,
)
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class Landmark(MixerConfig):
    """See the head of the file."""

    block_size: int = 63
    """Tokens of a block besides its landmark; the paper's blocks have 50, its kernels' 63."""
    num_heads: int = 1
    num_kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = None
    """Width of a head; None is d_model / heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""
    max_position_jump: int = 0
    """Largest random gap of positions before each block while training, drawn per layer (the paper's p_jump is 100): so
    distances are seen that are longer than the rows."""
    top_k: int | None = None
    """Past blocks that prefill and step read; None is all of them."""
    select_per: SelectionScope = "head_and_token"
    """Who chooses blocks of its own."""
    position_mode: PositionMode = "compressed"
    """How far away retrieved blocks seem to be: `stingy` never exceeds top_k + 2 blocks."""
    min_probability: float = 0.0
    """Of a landmark among all earlier ones, for its block to be read (appendix D has 0.3)."""

    def __post_init__(self) -> None:
        require_at_least(1, block_size=self.block_size, top_k=1 if self.top_k is None else self.top_k)
        if self.max_position_jump < 0:
            raise ConfigError(f"max_position_jump is {self.max_position_jump}; it must be at least 0 positions")
        if not 0 <= self.min_probability <= 1:
            raise ConfigError(f"min_probability is {self.min_probability}; it must be from 0 to 1")

    @property
    def landmark_interval(self) -> int:
        return self.block_size

    @property
    def retrieval(self) -> BlockRetrieval | None:
        """None reads all blocks."""
        if self.top_k is None:
            return None
        return BlockRetrieval(
            top_k=self.top_k,
            selection_scope=self.select_per,
            position_mode=self.position_mode,
            min_probability=self.min_probability,
        )

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "LandmarkMixer":
        return LandmarkMixer(self, d_model, layer, precision=precision, rngs=rngs)


class LandmarkState(NamedTuple):
    """The blocks, and what each head's blocks are chosen by where that outlasts a token."""

    cache: LandmarkCache
    max_log_prob: Float[Array, "B H N"] | None
    """Largest log-probability of each block over the tokens of the unfinished one; 0 where there is none."""


class BlockQueries(NamedTuple):
    """Tokens projected, and the blocks that they want to read (`retrieval.SelectedBlocks`)."""

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

    def __init__(self, config: Landmark, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        if config.head_dim is not None and config.head_dim < 1:
            raise ConfigError(f"head_dim is {config.head_dim}; it must be at least 1 (or None for d_model / heads)")
        self.head_dim = config.head_dim or head_dim_of("landmark attention", d_model, self.num_heads)
        head_dim_of("landmark attention's query heads over key/value heads", self.num_heads, self.num_kv_heads)
        if config.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(
                f"a head is {self.head_dim} wide; rotary positions need an even width (or rotary_base=None)"
            )
        self.block_size, self.rope_theta, self.retrieval = config.block_size, config.rope_theta, config.retrieval
        self.max_position_jump, self.dtype = config.max_position_jump, precision.compute
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        std = residual_std(layer.num_layers)
        self.out = Linear(q_width, d_model, precision=precision, rngs=rngs, std=std, axes=("heads", "embed"))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        positions, (q, k, v) = jnp.asarray(seq.positions), self.project_qkv(x)
        at = positions
        if self.max_position_jump and seq.key is not None:
            at = add_position_jumps(positions, self.block_size + 1, self.max_position_jump, seq.key)
        y = landmark_attention(
            self._rotate_to(q, at),
            self._rotate_to(k, at),
            v,
            block_size=self.block_size,
            positions=positions,
            segment_ids=jnp.asarray(seq.segment_ids),
        )
        return self.out(y.reshape(*x.shape[:-1], -1)), {}

    def init_state(self, batch: int, max_len: int) -> LandmarkState:
        cache = init_landmark_cache(batch, max_len, self.block_size, self.num_kv_heads, self.head_dim, self.dtype)
        chosen_over_time = self.retrieval is not None and self.retrieval.selection_scope == "head"
        best = jnp.zeros((batch, self.num_heads, cache.landmark_k.shape[1])) if chosen_over_time else None
        return LandmarkState(cache, best)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: LandmarkState
    ) -> tuple[Float[Array, "B T D"], LandmarkState, Aux]:
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        q, k, v = self.project_qkv(x)
        placed, best = self._rotate_to(k, positions % (self.block_size + 1)), state.max_log_prob
        if self.retrieval is None:
            blocks = cached_and_new_blocks(placed, v, segments, positions, state.cache)
            y = landmark_attention(
                self._rotate_to(q, positions),
                self._rotate_to(k, positions),
                v,
                block_size=self.block_size,
                positions=positions,
                segment_ids=segments,
                cache=rotate_cache_to_true_positions(state.cache, positions[:, 0], self.rotate),
            )
        else:
            y, blocks, best = retrieval_attention(
                self.scale_queries(q), placed, v, segments, positions, state.cache, best, self.retrieval, self.rotate
            )
        cache, best = update_cache_and_log_probs(
            state.cache, state.max_log_prob, blocks, best, placed, v, segments, positions
        )
        return self.out(y.astype(v.dtype).reshape(*x.shape[:-1], -1)), LandmarkState(cache, best), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: LandmarkState
    ) -> tuple[Float[Array, "B D"], LandmarkState]:
        position, active = jnp.asarray(info.position), jnp.asarray(info.active)
        q, k, v = (part[:, 0] for part in self.project_qkv(x[:, None]))
        k = self._rotate_to(k[:, None], position[:, None] % (self.block_size + 1))[:, 0]
        cache, best = append_to_partial_block(state.cache, k, v, position, active), state.max_log_prob
        if self.retrieval is None:
            y = attend_all_blocks(self.scale_queries(q), cache, position, self.rotate)
        else:
            y, best = retrieval_attention_step(
                self.scale_queries(q), cache, position, active, best, self.retrieval, self.rotate
            )
        y = self.out(y.astype(v.dtype).reshape(*x.shape[:-1], -1))
        return jnp.where(active[:, None], y, 0), LandmarkState(close_partial_block(cache, k, position, active), best)

    def select_blocks(
        self,
        x: Float[Array, "B C D"],
        first_position: Int[Array, ""],
        landmark_keys: Float[Array, "B N G K"],
        max_log_prob: Array | None,
    ) -> tuple[BlockQueries, Array | None]:
        """What C tokens of one block project to and want to read, the block's first one at position `first_position` or before;
        for readers that keep blocks elsewhere. `max_log_prob` as in `LandmarkState`."""
        rows, count = x.shape[0], landmark_keys.shape[1]
        assert self.retrieval is not None
        positions = jnp.broadcast_to(first_position + jnp.arange(x.shape[1])[None], x.shape[:2])
        q, k, v = self.project_qkv(x)
        number = jnp.broadcast_to(jnp.arange(count)[None], (rows, count))
        visible = number[:, None] < positions[:, :, None] // (self.block_size + 1)
        q = self.scale_queries(q)
        chosen, max_log_prob = select_cached_blocks(
            q, landmark_keys, number, visible, positions, self.block_size, max_log_prob, self.retrieval, self.rotate
        )
        return BlockQueries(
            q, self._rotate_to(k, positions % (self.block_size + 1)), v, positions, *chosen
        ), max_log_prob

    def read_blocks(
        self, queries: BlockQueries, blocks: GatheredBlocks, valid: Bool[Array, "B C X N"], own_k: Array, own_v: Array
    ) -> Float[Array, "B C D"]:
        """The output, given the blocks and the own block's keys and values, these tokens' among them."""
        place = queries.positions % (self.block_size + 1)
        seen = jnp.arange(self.block_size)[None, None] <= place[:, :, None]
        y = attend_selected_blocks(queries.q, blocks, valid, queries.distance, own_k, own_v, seen, place, self.rotate)
        return self.out(y.astype(queries.v.dtype).reshape(*y.shape[:2], -1))

    def project_qkv(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Queries, keys and values, not turned yet."""
        q, k, v = (part(x).reshape(*x.shape[:-1], -1, self.head_dim) for part in (self.q, self.k, self.v))
        return q, k, v

    def scale_queries(self, q: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """Queries by K^-0.5, as the parts of the op take them."""
        return q * jnp.asarray(self.head_dim**-0.5, q.dtype)

    @property
    def rotate(self):
        """Turns vectors by distances."""
        return partial(_rotate, self.rope_theta)

    def _rotate_to(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        return x if self.rope_theta is None else rotary(x, positions, self.rope_theta)


def add_position_jumps(
    positions: Int[Array, "B T"], block_size: int, max_jump: int, key: PRNGKeyArray
) -> Int[Array, "B T"]:
    """Positions with a gap of 0 to `jump` before each block of a document but the first."""
    gaps = jax.random.randint(key, positions.shape, 0, max_jump + 1, positions.dtype)
    total = jnp.cumsum(jnp.where((positions % block_size == 0) & (positions > 0), gaps, 0), axis=1)
    first = jnp.maximum(jnp.arange(positions.shape[1])[None] - positions, 0)
    return positions + total - jnp.take_along_axis(total, first, axis=1)


def _rotate(rope_theta: float | None, x: Float[Array, "... K"], distance: Int[Array, "..."]) -> Float[Array, "... K"]:
    if rope_theta is None:
        return x
    return rotary(x.reshape(1, -1, 1, x.shape[-1]), distance.reshape(1, -1), rope_theta).reshape(x.shape)
