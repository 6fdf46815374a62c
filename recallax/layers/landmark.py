"""Landmark attention: softmax attention over past blocks, weighted or selected by one landmark token per block.

The language model inserts a landmark token after every `block_size` tokens of a document and drops its output. To this
mixer the landmark is the token at each position p with p % (block_size + 1) = block_size. Training uses the grouped
softmax over all blocks. With `top_k`, prefill and step read only the k blocks with the largest landmark scores, which
is a different function unless k covers all blocks.

State: keys and values of all earlier tokens by block, (2 block_size + 1) G K elements per block in the compute dtype.
Cached keys are rotated to their offset in the block only, so that a block can be read at any distance.
Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError, require_at_least
from recallax.layers.attention_heads import attention_head_dim
from recallax.layers.base import LayerInfo, MixerConfig, RecurrentMixer
from recallax.layers.dense import Linear, residual_linear
from recallax.layers.rotary import add_position_jumps, rotary, rotate_by_distance
from recallax.pallas_kernels.landmark_attention import (
    BlockRetrieval,
    GatheredBlocks,
    LandmarkCache,
    PositionMode,
    Rotate,
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
    """Softmax attention over blocks with landmark tokens."""

    block_size: int = 63
    """Tokens of a block without its landmark; 50 in the paper's text and 63 in its kernels."""
    num_heads: int = 1
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads, each shared by a group of query heads; None: `num_heads`."""
    head_dim: int | None = None
    """Width of a head; None: d_model / num_heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None: no positional embedding."""
    max_position_jump: int = 0
    """Largest random gap of positions before each block in training, for distances beyond the row (paper: 100)."""
    top_k: int | None = None
    """Past blocks that prefill and step read; None: all of them."""
    select_per: SelectionScope = "head_and_token"
    """Unit that selects its own blocks: each head and token, each token for all heads, or each head per query block."""
    position_mode: PositionMode = "compressed"
    """Positions of retrieved blocks: true ones, or compressed to distances of at most top_k + 2 blocks."""
    min_probability: float = 0.0
    """Smallest probability of a landmark among all earlier ones with which its block is read (appendix D: 0.3)."""

    def __post_init__(self) -> None:
        require_at_least(1, block_size=self.block_size, top_k=self.top_k)
        require_at_least(0, max_position_jump=self.max_position_jump)
        if not 0 <= self.min_probability <= 1:
            raise ConfigError(f"min_probability is {self.min_probability}; it must be from 0 to 1")

    @property
    def landmark_interval(self) -> int:
        return self.block_size

    @property
    def retrieval(self) -> BlockRetrieval | None:
        """Options of the retrieval of blocks; None: all blocks are read."""
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
    """State of `Landmark`."""

    cache: LandmarkCache
    """Keys and values by block."""
    max_log_prob: Float[Array, "B H N"] | None
    """Largest log-probability of each block over the unfinished block's tokens, 0 without one; only for "head"."""


class BlockQueries(NamedTuple):
    """Projected tokens of one block, and the past blocks that they select, for readers that store blocks elsewhere."""

    q: Float[Array, "B C H K"]
    """Scaled queries before rotation."""
    k: Float[Array, "B C G K"]
    """Keys, rotated to their offset in the block."""
    v: Float[Array, "B C G K"]
    positions: Int[Array, "B C"]
    index: Int[Array, "B C X N"]
    """Selected blocks in the order of time, per head or (X = 1) for all heads; the number of blocks where unused."""
    distance: Int[Array, "B C X N"]
    """Distance from the first token of each selected block to the query."""


class LandmarkMixer(RecurrentMixer):
    """Projections, rotary positions, grouped softmax attention and retrieval of blocks."""

    def __init__(self, config: Landmark, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs):
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.head_dim = attention_head_dim(
            "landmark attention",
            d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
        )
        self.block_size, self.rope_theta, self.retrieval = config.block_size, config.rope_theta, config.retrieval
        self.max_position_jump, self.dtype = config.max_position_jump, precision.compute
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q = Linear(d_model, q_width, precision=precision, rngs=rngs)
        self.k = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.v = Linear(d_model, kv_width, precision=precision, rngs=rngs)
        self.out = residual_linear(q_width, d_model, layer.num_layers, in_axis="heads", precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        positions, (q, k, v) = jnp.asarray(seq.positions), self.project_qkv(x)
        rotary_positions = positions
        if self.max_position_jump and seq.key is not None:
            rotary_positions = add_position_jumps(positions, self.block_size + 1, self.max_position_jump, seq.key)
        y = landmark_attention(
            self._rotate_to(q, rotary_positions),
            self._rotate_to(k, rotary_positions),
            v,
            block_size=self.block_size,
            positions=positions,
            segment_ids=jnp.asarray(seq.segment_ids),
        )
        return self.out(y.reshape(*x.shape[:-1], -1)), {}

    def init_state(self, batch: int, max_len: int) -> LandmarkState:
        cache = init_landmark_cache(batch, max_len, self.block_size, self.num_kv_heads, self.head_dim, self.dtype)
        select_per_head = self.retrieval is not None and self.retrieval.selection_scope == "head"
        shape = (batch, self.num_heads, cache.landmark_k.shape[1])
        return LandmarkState(cache, jnp.zeros(shape) if select_per_head else None)

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: LandmarkState
    ) -> tuple[Float[Array, "B T D"], LandmarkState, Aux]:
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        q, k, v = self.project_qkv(x)
        block_k, max_log_prob = self._rotate_to(k, positions % (self.block_size + 1)), state.max_log_prob
        if self.retrieval is None:
            blocks = cached_and_new_blocks(block_k, v, segment_ids, positions, state.cache)
            y = landmark_attention(
                self._rotate_to(q, positions),
                self._rotate_to(k, positions),
                v,
                block_size=self.block_size,
                positions=positions,
                segment_ids=segment_ids,
                cache=rotate_cache_to_true_positions(state.cache, positions[:, 0], self.rotate),
            )
        else:
            y, blocks, max_log_prob = retrieval_attention(
                self.scale_queries(q),
                block_k,
                v,
                segment_ids,
                positions,
                state.cache,
                max_log_prob,
                self.retrieval,
                self.rotate,
            )
        cache, max_log_prob = update_cache_and_log_probs(
            state.cache, state.max_log_prob, blocks, max_log_prob, block_k, v, segment_ids, positions
        )
        return self.out(y.astype(v.dtype).reshape(*x.shape[:-1], -1)), LandmarkState(cache, max_log_prob), {}

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: LandmarkState
    ) -> tuple[Float[Array, "B D"], LandmarkState]:
        position, active = jnp.asarray(info.position), jnp.asarray(info.active)
        q, k, v = (part[:, 0] for part in self.project_qkv(x[:, None]))
        k = self._rotate_to(k[:, None], position[:, None] % (self.block_size + 1))[:, 0]
        cache, max_log_prob = append_to_partial_block(state.cache, k, v, position, active), state.max_log_prob
        if self.retrieval is None:
            y = attend_all_blocks(self.scale_queries(q), cache, position, self.rotate)
        else:
            y, max_log_prob = retrieval_attention_step(
                self.scale_queries(q), cache, position, active, max_log_prob, self.retrieval, self.rotate
            )
        y = self.out(y.astype(v.dtype).reshape(*x.shape[:-1], -1))
        cache = close_partial_block(cache, k, position, active)
        return jnp.where(active[:, None], y, 0), LandmarkState(cache, max_log_prob)

    def select_blocks(
        self,
        x: Float[Array, "B C D"],
        first_position: Int[Array, ""],
        landmark_keys: Float[Array, "B N G K"],
        max_log_prob: Array | None,
    ) -> tuple[BlockQueries, Array | None]:
        """Select the past blocks that C tokens of one block read, for a reader that stores the blocks elsewhere.

        Args:
            x: Inputs of consecutive tokens of one block.
            first_position: Position of the first of them.
            landmark_keys: Landmark keys of all complete blocks.
            max_log_prob: As in `LandmarkState`.

        Returns:
            Projected tokens with their selected blocks, and the new `max_log_prob`.
        """
        assert self.retrieval is not None
        positions = jnp.broadcast_to(first_position + jnp.arange(x.shape[1])[None], x.shape[:2])
        q, k, v = self.project_qkv(x)
        number = jnp.broadcast_to(jnp.arange(landmark_keys.shape[1])[None], landmark_keys.shape[:2])
        visible = number[:, None] < positions[:, :, None] // (self.block_size + 1)
        q = self.scale_queries(q)
        selected, max_log_prob = select_cached_blocks(
            q, landmark_keys, number, visible, positions, self.block_size, max_log_prob, self.retrieval, self.rotate
        )
        k = self._rotate_to(k, positions % (self.block_size + 1))
        return BlockQueries(q, k, v, positions, *selected), max_log_prob

    def read_blocks(
        self, queries: BlockQueries, blocks: GatheredBlocks, valid: Bool[Array, "B C X N"], own_k: Array, own_v: Array
    ) -> Float[Array, "B C D"]:
        """Attend to selected blocks and to the current block.

        Args:
            queries: Result of `select_blocks`.
            blocks: Keys and values of the selected blocks.
            valid: False for unused places of `queries.index`.
            own_k: Keys of the current block [B, block_size, G, K], including those of `queries`.
            own_v: Values of the current block [B, block_size, G, K], including those of `queries`.

        Returns:
            Outputs in the compute dtype.
        """
        offset = queries.positions % (self.block_size + 1)
        visible = jnp.arange(self.block_size)[None, None] <= offset[:, :, None]
        q, distance = queries.q, queries.distance
        y = attend_selected_blocks(q, blocks, valid, distance, own_k, own_v, visible, offset, self.rotate)
        return self.out(y.astype(queries.v.dtype).reshape(*y.shape[:2], -1))

    def project_qkv(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Compute queries, keys and values before rotation.

        Args:
            x: Inputs.

        Returns:
            Queries, keys and values by head.
        """
        q, k, v = (part(x).reshape(*x.shape[:-1], -1, self.head_dim) for part in (self.q, self.k, self.v))
        return q, k, v

    def scale_queries(self, q: Float[Array, "... K"]) -> Float[Array, "... K"]:
        """Scale queries by K^-0.5, as the functions of the op expect.

        Args:
            q: Queries.

        Returns:
            Scaled queries in their dtype.
        """
        return q * jnp.asarray(self.head_dim**-0.5, q.dtype)

    @property
    def rotate(self) -> Rotate:
        """Function that rotates vectors by distances."""
        return partial(rotate_by_distance, self.rope_theta)

    def _rotate_to(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        return x if self.rope_theta is None else rotary(x, positions, self.rope_theta)
