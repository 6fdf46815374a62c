"""Memory as context (MAC): attention within a block also reads vectors retrieved from a memory, which then learns.

    h = retrieve(M_start, queries)             M_start: the memory at the start of the block
    y = rms(W_o attention over [persistent | h | block])
    r, M = memory(y)                           the memory is updated while it is read
    o = y * silu(rms(r))

Blocks are processed one after another, because each one retrieves from the memory that the previous one has updated. In
the printed equations every token of a block attends to the vectors retrieved for all of its tokens, and the gate reads
the memory after the last token; both leak future tokens. Here r_i is read after token i, and `query_source` selects one
of three causal ways to retrieve:

    own         each token is a query; its retrieved vector is visible to itself and later tokens of the block
    previous    the previous block's tokens, averaged to `num_retrieved_tokens` queries; none in the first block
    learned     `num_retrieved_tokens` queries that are parameters

Retrieved and persistent tokens have no position; a token's position is its offset in the block, whose grid counts from
the start of the document. Retrieved vectors are not normalized: a norm between the memory and the attention, whose
output the memory reads again, amplifies rounding errors.

State: the memory; keys and values of the unfinished block's tokens and retrieved vectors; for `own` the memory at the
start of the block; for `previous` the sums of the block's inputs.

Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), section 4.1, equations 21 to 25; the block of 512 tokens with
128 persistent and 256 retrieved tokens as in its NeurIPS version; the gate, which MAC leaves open, as in MAG.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError, require_at_least
from recallax.layers.base import LayerInfo, MixerConfig, QueryableMixer, RecurrentMixer, State
from recallax.layers.block_context import (
    BlockContext,
    QuerySource,
    causal_slot_mask,
    clear_unused_slots,
    visible_retrieved,
    write_slots,
)
from recallax.layers.dense import parameter
from recallax.layers.norm import RMSNorm
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.state_reset import reset_for_prefill, reset_for_step, where_rows, zero_rows
from recallax.pallas_kernels.grid import grid_blocks, merge_grid_blocks, misaligned_rows, split_grid_blocks
from recallax.pallas_kernels.window_attention import KVCache, masked_attention
from recallax.types import Aux, Precision, SeqInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class MemoryAsContext(MixerConfig):
    """Blockwise attention that also reads a memory (MAC of Titans)."""

    memory: MixerConfig
    """Memory that can be read without writing: NeuralMemory."""
    block_size: int = 512
    """Tokens of a block, which attend to each other; a multiple of the memory's grid."""
    query_source: QuerySource = "own"
    """Source of the queries to the memory."""
    num_retrieved_tokens: int = 256
    """Queries per block of `previous` (a divisor of `block_size`) and of `learned`."""
    num_persistent_tokens: int = 128
    """Learned key/value tokens without a position, visible to all tokens."""
    num_heads: int = 1
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads, each shared by a group of query heads; None: `num_heads`."""
    head_dim: int | None = None
    """Width of a head; None: d_model / num_heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None: no positional embedding."""

    def __post_init__(self) -> None:
        size, count = self.block_size, self.num_retrieved_tokens
        require_at_least(1, block_size=size)
        if size % self.memory.grid:
            raise ConfigError(
                f"block_size is {size} tokens; it must be a multiple of the memory's chunk of {self.memory.grid}"
            )
        if self.query_source != "own":
            require_at_least(1, num_retrieved_tokens=count)
        if self.query_source == "previous" and size % count:
            raise ConfigError(f"num_retrieved_tokens is {count}; it must divide the block of {size} tokens")

    @property
    def grid(self) -> int:
        return self.block_size

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryAsContextMixer":
        return MemoryAsContextMixer(self, d_model, layer, precision=precision, rngs=rngs)


class MemoryAsContextState(NamedTuple):
    """State of `MemoryAsContext`."""

    memory: State
    input_sums: Float[Array, "B N D"] | None
    """Sums of the block's inputs per query of the next block; None except for `previous`."""
    block: BlockContext | None
    """The unfinished block; None only within a call on whole sequences, where no block continues an earlier one."""


class MemoryAsContextMixer(RecurrentMixer):
    """Attention within blocks over tokens, persistent tokens and retrieved vectors, gated by the memory's output."""

    def __init__(
        self, config: MemoryAsContext, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs
    ):
        self.block_size, self.d_model = config.block_size, d_model
        self.query_source: QuerySource = config.query_source
        self.num_retrieved_tokens = config.block_size if config.query_source == "own" else config.num_retrieved_tokens
        self.attention = SoftmaxAttentionMixer(
            d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads or config.num_heads,
            head_dim=config.head_dim,
            window=None,
            rope_theta=config.rope_theta,
            num_persistent_tokens=config.num_persistent_tokens,
            num_layers=layer.num_layers,
            precision=precision,
            rngs=rngs,
        )
        self.memory = _require_queryable(config.memory.build(d_model, layer, precision=precision, rngs=rngs))
        queries = jax.random.normal(rngs.params(), (config.num_retrieved_tokens, d_model), precision.param)
        learned = config.query_source == "learned"
        self.questions = parameter(queries, (None, "embed"), weight_decay=False) if learned else None
        self.attention_norm, self.memory_norm = (RMSNorm(d_model, precision=precision) for _ in range(2))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        empty = self.init_state(x.shape[0], x.shape[1])
        y, _, aux = self._scan_blocks(x, seq, empty._replace(block=None))
        return y, aux

    def init_state(self, batch: int, max_len: int) -> MemoryAsContextState:
        own, previous = self.query_source == "own", self.query_source == "previous"
        memory = self.memory.init_state(batch, max_len)
        token_kv = self.attention.init_state(batch, min(self.block_size, max_len))
        retrieved_kv = token_kv if own else self.attention.init_state(batch, self.num_retrieved_tokens)
        memory_at_start = jax.tree.map(jnp.zeros_like, self.memory.read_state(memory)) if own else None
        input_sums = jnp.zeros((batch, self.num_retrieved_tokens, self.d_model), jnp.float32) if previous else None
        return MemoryAsContextState(memory, input_sums, BlockContext(memory_at_start, token_kv, retrieved_kv))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B T D"], MemoryAsContextState, Aux]:
        return self._scan_blocks(x, seq, reset_for_prefill(state, seq))

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B D"], MemoryAsContextState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        state, (y, _) = self._block_step(reset_for_step(state, info), (x[:, None], seq))
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _scan_blocks(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B T D"], MemoryAsContextState, Aux]:
        """Process the blocks in order; the first one may continue the state's unfinished block."""
        rows, length = x.shape[:2]
        positions, segment_ids = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        offset = None if state.block is None else positions[:, 0] % self.block_size
        blocks = grid_blocks(length, self.block_size, offset, rows)
        inputs, block_positions, block_ids = (split_grid_blocks(a, blocks) for a in (x, positions, segment_ids))
        block_seq = SeqInfo(block_positions, jnp.where(blocks.mask, block_ids, 0), jnp.zeros(blocks.mask.shape, bool))
        state, (y, aux) = jax.lax.scan(jax.checkpoint(self._block_step), state, (inputs, block_seq))
        y = merge_grid_blocks(y, length, self.block_size, offset)
        misaligned = misaligned_rows(positions, segment_ids, blocks, self.block_size)
        y = jnp.where(misaligned[:, None, None], jnp.full_like(y, jnp.nan), y)
        return y, state, jax.tree.map(lambda a: a.sum(axis=0), aux)

    def _block_step(
        self, state: MemoryAsContextState, block_inputs: tuple[Array, SeqInfo]
    ) -> tuple[MemoryAsContextState, tuple[Array, Aux]]:
        """Process tokens of one block; in rows with fewer tokens the rest is padding on the right."""
        x, seq = block_inputs
        positions, valid = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids) > 0
        memory, input_sums, block = zero_rows(state, valid[:, 0] & (positions[:, 0] == 0))
        start = jnp.zeros_like(positions[:, 0]) if block is None else positions[:, 0] % self.block_size
        slots = start[:, None] + jnp.arange(x.shape[1])[None]
        context = self._extend_block(x, slots, memory, input_sums, block)
        y = self._attend(x, slots, positions[:, 0] >= self.block_size, context)
        retrieved, memory, aux = self.memory.prefill(y, seq, memory)
        gate = jax.nn.silu(self.memory_norm(retrieved).astype(jnp.float32))
        out = (y.astype(jnp.float32) * gate).astype(y.dtype)

        end = start + valid.sum(axis=1)
        if input_sums is not None:
            input_sums = jnp.where((start == 0)[:, None, None], 0, input_sums) + self._input_sums(x, start, end)
        unfinished = None
        if block is not None:
            unfinished = clear_unused_slots(context, end, self.block_size, self.query_source)
        return where_rows(valid[:, 0], MemoryAsContextState(memory, input_sums, unfinished), state), (out, aux)

    def _extend_block(
        self,
        x: Float[Array, "B N D"],
        slots: Int[Array, "B N"],
        memory: State,
        input_sums: Float[Array, "B M D"] | None,
        block: BlockContext | None,
    ) -> BlockContext:
        """Add keys and values of these tokens, and of the vectors retrieved for them, to the block."""
        start, read_state = slots[:, 0], self.memory.read_state(memory)
        is_first = start == 0
        new_kv = KVCache(*self.attention.project_qkv(x, slots)[1:])
        token_kv = new_kv if block is None else write_slots(new_kv, block.token_kv, start)
        if self.query_source == "own":
            if block is not None:
                read_state = where_rows(is_first, read_state, block.memory_at_start)
            retrieved_kv = self._retrieved_kv(x, read_state)
            if block is not None:
                retrieved_kv = write_slots(retrieved_kv, block.retrieved_kv, start)
            return BlockContext(read_state, token_kv, retrieved_kv)
        if self.questions is not None:
            queries = jnp.broadcast_to(self.questions[...][None], (x.shape[0], *self.questions.shape))
        else:
            assert input_sums is not None
            queries = input_sums * (self.num_retrieved_tokens / self.block_size)
        queries = queries.astype(x.dtype)
        if block is None:
            return BlockContext(None, token_kv, self._retrieved_kv(queries, read_state))
        # Most steps are not the first of a block, and then the retrieved vectors are in the state.
        retrieved_kv = jax.lax.cond(
            is_first.any(), lambda: self._retrieved_kv(queries, read_state), lambda: block.retrieved_kv
        )
        return BlockContext(None, token_kv, where_rows(is_first, retrieved_kv, block.retrieved_kv))

    def _retrieved_kv(self, queries: Float[Array, "B N D"], read_state: State) -> KVCache:
        return KVCache(*self.attention.unrotated_kv(self.memory.retrieve(queries, read_state)))

    def _attend(
        self, x: Float[Array, "B N D"], slots: Int[Array, "B N"], has_previous: Bool[Array, " B"], block: BlockContext
    ) -> Float[Array, "B N D"]:
        q, _, _ = self.attention.project_qkv(x, slots)
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(block.retrieved_kv, block.token_kv, strict=True))
        visible = visible_retrieved(self.query_source, slots, block.retrieved_kv.k.shape[1], has_previous)
        visible = jnp.concatenate([visible, causal_slot_mask(slots, block.token_kv.k.shape[1])], axis=2)
        y = masked_attention(q, k, v, visible, persistent=self.attention.persistent_kv())
        return self.attention_norm(self.attention.out(y.reshape(*x.shape[:-1], -1)))

    def _input_sums(
        self, x: Float[Array, "B N D"], start: Int[Array, " B"], end: Int[Array, " B"]
    ) -> Float[Array, "B M D"]:
        """Sum the inputs over the part of the block that belongs to each query of the next block."""
        empty = jnp.zeros((x.shape[0], self.block_size, self.d_model), jnp.float32)
        slots = write_slots(x.astype(jnp.float32), empty, start)
        slots = jnp.where((jnp.arange(self.block_size)[None] < end[:, None])[..., None], slots, 0)
        return slots.reshape(x.shape[0], self.num_retrieved_tokens, -1, self.d_model).sum(axis=2)


def _require_queryable(mixer: nnx.Module) -> QueryableMixer:
    if not isinstance(mixer, QueryableMixer):
        name = type(mixer).__name__
        raise ConfigError(f"{name} does not support queries; the memory of MemoryAsContext must be NeuralMemory")
    return mixer
