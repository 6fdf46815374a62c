"""Memory as a context (MAC): attention over a segment reads what a memory answered, and the memory learns what it saw.

    h = recall(M_start, questions)             M_start: the memory as the segment found it
    y = rms(W_o attention over [persistent | h | segment])
    r, M = memory(y)                           which learns while it reads y
    o = y * silu(rms(r))

Segments follow one another, for the questions to each need the memory after the one before. As printed, the answers to
all of a segment's tokens stand before its first one, and the gate reads the memory after its last: both tell the
future. Here r_i is read of the memory after token i, and there are three ways of asking:

    own         token i asks, and is heard by tokens from i on; as many answers as tokens
    previous    the tokens of the segment before ask, averaged down to `num_retrieved_tokens` questions; none in the first segment
    learned     `num_retrieved_tokens` questions that are parameters

Answers and persistent tokens have no position; a token's is its place in the segment, whose grid counts from the
document's beginning. Answers are not normalised: they start small, while a norm on the way from the memory through the
attention back into it makes rounding grow until nothing is left. State: the memory; of the unfinished segment the keys
and values of tokens and answers, and, for `own`, what the memory held at its start; for `previous` the sums of the
inputs.

Source: Titans (Behrouz et al. 2025, arXiv 2501.00663), section 4.1, equations 21 to 25; the segment of 512, 128
persistent and 256 retrieved tokens as in its NeurIPS version; the gate, which MAC leaves open, as for MAG.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import LayerInfo, MixerConfig, QueryableMixer, RecurrentMixer, State
from recallax.layers.dense import parameter
from recallax.layers.norm import RMSNorm
from recallax.layers.softmax_attention import SoftmaxAttentionMixer
from recallax.layers.state_reset import reset_for_prefill, reset_for_step, zero_rows
from recallax.pallas_kernels.window_attention import KVCache, masked_attention
from recallax.types import Aux, Precision, SeqInfo, StepInfo

type QuerySource = Literal["own", "previous", "learned"]


@dataclass(frozen=True, kw_only=True)
class MemoryAsContext(MixerConfig):
    """See the head of the file. Raises ConfigError where the grids do not fit."""

    memory: MixerConfig
    """One that can be asked: NeuralMemory."""
    block_size: int = 512
    """Tokens that attend to one another."""
    query_source: QuerySource = "own"
    num_retrieved_tokens: int = 256
    """Questions per segment of `previous`, which averages over segment / retrieved tokens, and of `learned`."""
    num_persistent_tokens: int = 128
    """Learned tokens that every token sees besides."""
    num_heads: int = 1
    num_kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = None
    """Width of a head; None is d_model / heads."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size % self.memory.grid:
            raise ConfigError(
                f"block_size is {self.block_size} tokens; it must be a multiple of the memory's chunk of {self.memory.grid}"
            )
        if self.query_source != "own" and self.num_retrieved_tokens < 1:
            raise ConfigError(f"num_retrieved_tokens is {self.num_retrieved_tokens}; it must be at least 1 question")
        if self.query_source == "previous" and self.block_size % self.num_retrieved_tokens:
            raise ConfigError(
                f"num_retrieved_tokens is {self.num_retrieved_tokens}; it must divide the segment of {self.block_size} tokens"
            )

    @property
    def grid(self) -> int:
        return self.block_size

    def build(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryAsContextMixer":
        return MemoryAsContextMixer(self, d_model, layer, precision=precision, rngs=rngs)


class BlockContext(NamedTuple):
    """What the tokens of an unfinished segment may see; zeros beyond them, and zeros between segments."""

    memory_at_start: State | None
    """What the memory held before it (`own`)."""
    token_kv: KVCache
    retrieved_kv: KVCache


class MemoryAsContextState(NamedTuple):
    """See the head of the file."""

    memory: State
    input_sums: Float[Array, "B N D"] | None
    """Sums of the segment's inputs, to be the next one's questions (`previous`)."""
    block: BlockContext | None
    """None only inside a call, whose pieces are whole: nothing of them need be kept."""


class MemoryAsContextMixer(RecurrentMixer):
    """See the head of the file."""

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
        asked = jax.random.normal(rngs.params(), (config.num_retrieved_tokens, d_model), precision.param)
        self.questions = (
            parameter(asked, (None, "embed"), weight_decay=False) if config.query_source == "learned" else None
        )
        self.attention_norm, self.memory_norm = (RMSNorm(d_model, precision=precision) for _ in range(2))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        empty = self.init_state(x.shape[0], x.shape[1])
        y, _, aux = self._scan_blocks(x, seq, empty._replace(block=None))
        return y, aux

    def init_state(self, batch: int, max_len: int) -> MemoryAsContextState:
        memory = self.memory.init_state(batch, max_len)
        tokens = self.attention.init_state(batch, min(self.block_size, max_len))
        answers = tokens if self.query_source == "own" else self.attention.init_state(batch, self.num_retrieved_tokens)
        start = jax.tree.map(jnp.zeros_like, self.memory.read_state(memory)) if self.query_source == "own" else None
        inputs = (
            jnp.zeros((batch, self.num_retrieved_tokens, self.d_model), jnp.float32)
            if self.query_source == "previous"
            else None
        )
        return MemoryAsContextState(memory, inputs, BlockContext(start, tokens, answers))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B T D"], MemoryAsContextState, Aux]:
        return self._scan_blocks(x, seq, reset_for_prefill(state, seq))

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B D"], MemoryAsContextState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        state, (y, _, _) = self._block_step(reset_for_step(state, info), (x[:, None], seq))
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _scan_blocks(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B T D"], MemoryAsContextState, Aux]:
        """Piece by piece, each of one segment; the first ends where the row's unfinished segment does."""
        length = x.shape[1]
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids)
        begun = jnp.zeros_like(positions[:, 0]) if state.block is None else positions[:, 0] % self.block_size
        width, before = min(self.block_size, length), self.block_size - 1 if state.block is not None else 0
        count = -(-(length + before) // self.block_size)
        first = jnp.maximum(jnp.arange(count)[:, None] * self.block_size - begun[None], 0)  # [N, B]
        last = jnp.minimum(jnp.arange(1, count + 1)[:, None] * self.block_size - begun[None], length)
        source = first[..., None] + jnp.arange(width)[None, None]
        inside = source < last[..., None]
        source = jnp.minimum(source, length - 1)

        def cut(a: Array) -> Array:
            return jax.vmap(lambda index: _gather_rows(a, index))(source)

        parts = SeqInfo(cut(positions), jnp.where(inside, cut(segments), 0), jnp.zeros(inside.shape, bool))
        state, (y, aux, wrong) = jax.lax.scan(jax.checkpoint(self._block_step), state, (cut(x), parts))
        # Token t is the (t + begun)-th after the beginning of the row's first segment.
        place = begun[:, None] + jnp.arange(length)[None]
        number = place // self.block_size
        slot = jnp.where(number == 0, place - begun[:, None], place % self.block_size)
        y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], count * width, -1)
        y = _gather_rows(y, number * width + slot)
        y = jnp.where(wrong.any(axis=0)[:, None, None], jnp.full_like(y, jnp.nan), y)
        return y, state, jax.tree.map(lambda a: a.sum(axis=0), aux)

    def _block_step(
        self, state: MemoryAsContextState, part: tuple[Array, SeqInfo]
    ) -> tuple[MemoryAsContextState, tuple[Array, Aux, Array]]:
        """Tokens that belong to one segment, in rows that begin with them."""
        x, seq = part
        positions, valid = jnp.asarray(seq.positions), jnp.asarray(seq.segment_ids) > 0
        memory, inputs, segment = zero_rows(state, valid[:, 0] & (positions[:, 0] == 0))
        begun = jnp.zeros_like(positions[:, 0]) if segment is None else positions[:, 0] % self.block_size
        slots = begun[:, None] + jnp.arange(x.shape[1])[None]
        opened = self._extend_block(x, slots, memory, inputs, segment)
        y = self._attend(x, slots, positions[:, 0] >= self.block_size, opened)
        read, memory, aux = self.memory.prefill(y, seq, memory)
        gate = jax.nn.silu(self.memory_norm(read).astype(jnp.float32))
        out = (y.astype(jnp.float32) * gate).astype(y.dtype)

        end = begun + valid.sum(axis=1)
        on_grid = valid[:, :1] & (positions == positions[:, :1] + jnp.arange(x.shape[1])[None])
        on_grid &= positions[:, :1] % self.block_size == begun[:, None]
        if inputs is not None:
            inputs = jnp.where((begun == 0)[:, None, None], 0, inputs) + self._input_sums(x, begun, end)
        new = MemoryAsContextState(memory, inputs, None if segment is None else self._unfinished_block(opened, end))
        return _where_rows(valid[:, 0], new, state), (out, aux, (valid & ~on_grid).any(axis=1))

    def _extend_block(
        self,
        x: Float[Array, "B N D"],
        slots: Int[Array, "B N"],
        memory: State,
        input_sums: Float[Array, "B M D"] | None,
        block: BlockContext | None,
    ) -> BlockContext:
        """The segment with these tokens in it: keys, values, and answers."""
        begun, held = slots[:, 0], self.memory.read_state(memory)
        begins = begun == 0
        _, *new = self.attention.project_qkv(x, slots)
        tokens = KVCache(*new) if block is None else _write_slots(KVCache(*new), block.token_kv, begun)
        if self.query_source == "own":
            if block is not None:
                held = _where_rows(begins, held, block.memory_at_start)
            answers = self._retrieved_kv(x, held)
            return BlockContext(
                held, tokens, answers if block is None else _write_slots(answers, block.retrieved_kv, begun)
            )
        if self.questions is not None:
            questions = jnp.broadcast_to(self.questions[...][None], (x.shape[0], *self.questions.shape))
        else:
            assert input_sums is not None
            questions = input_sums * (self.num_retrieved_tokens / self.block_size)
        questions = questions.astype(x.dtype)
        if block is None:
            return BlockContext(None, tokens, self._retrieved_kv(questions, held))
        # Most steps are within a segment, whose answers are known.
        answers = jax.lax.cond(begins.any(), lambda: self._retrieved_kv(questions, held), lambda: block.retrieved_kv)
        return BlockContext(None, tokens, _where_rows(begins, answers, block.retrieved_kv))

    def _retrieved_kv(self, questions: Float[Array, "B N D"], read_state: State) -> KVCache:
        return KVCache(*self.attention.unrotated_kv(self.memory.retrieve(questions, read_state)))

    def _attend(
        self, x: Float[Array, "B N D"], slots: Int[Array, "B N"], has_previous: Bool[Array, " B"], block: BlockContext
    ) -> Float[Array, "B N D"]:
        q, _, _ = self.attention.project_qkv(x, slots)
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(block.retrieved_kv, block.token_kv, strict=True))
        heard = visible_retrieved(self.query_source, slots, block.retrieved_kv.k.shape[1], has_previous)
        visible = jnp.concatenate([heard, _causal_mask(slots, block.token_kv.k.shape[1])], axis=2)
        y = masked_attention(q, k, v, visible, persistent=self.attention.persistent_kv())
        return self.attention_norm(self.attention.out(y.reshape(*x.shape[:-1], -1)))

    def _input_sums(
        self, x: Float[Array, "B N D"], begun: Int[Array, " B"], end: Int[Array, " B"]
    ) -> Float[Array, "B M D"]:
        """Sums of the inputs over each question's stretch of the segment."""
        slots = jnp.zeros((x.shape[0], self.block_size, self.d_model), jnp.float32)
        placed = _write_slots(x.astype(jnp.float32), slots, begun)
        placed = jnp.where((jnp.arange(self.block_size)[None] < end[:, None])[..., None], placed, 0)
        return placed.reshape(x.shape[0], self.num_retrieved_tokens, -1, self.d_model).sum(axis=2)

    def _unfinished_block(self, block: BlockContext, end: Int[Array, " B"]) -> BlockContext:
        """What a segment of `end` tokens leaves for the next ones: nothing where it is full."""
        unfinished = end < self.block_size

        def filled(x: Array) -> Array:
            seen = (jnp.arange(x.shape[1])[None] < end[:, None]) & unfinished[:, None]
            return jnp.where(seen[..., None, None], x, 0)

        start, tokens, answers = block
        tokens = jax.tree.map(filled, tokens)
        answers = jax.tree.map(filled, answers) if self.query_source == "own" else zero_rows(answers, ~unfinished)
        return BlockContext(zero_rows(start, ~unfinished), tokens, answers)


def visible_retrieved(
    query_source: QuerySource, slots: Int[Array, "B N"], count: int, has_previous: Bool[Array, " B"]
) -> Bool[Array, "B N M"]:
    """Which answers a token hears; `has_previous`: the row's segment is not its document's first."""
    if query_source == "own":
        return _causal_mask(slots, count)
    heard = has_previous if query_source == "previous" else jnp.ones_like(has_previous)
    return jnp.broadcast_to(heard[:, None, None], (*slots.shape, count))


def _causal_mask(slots: Int[Array, "B N"], count: int) -> Bool[Array, "B N S"]:
    return jnp.arange(count)[None, None] <= slots[..., None]


def _write_slots[Tree](new: Tree, old: Tree, begun: Int[Array, " B"]) -> Tree:
    """Slots [B, S, ...] whose first ones are old and whose next are new [B, N, ...]."""

    def place(new: Array, old: Array) -> Array:
        source = jnp.arange(old.shape[1])[None] - begun[:, None]
        taken = _gather_rows(new, jnp.clip(source, 0, new.shape[1] - 1)).astype(old.dtype)
        return jnp.where((source >= 0).reshape(*source.shape, *[1] * (old.ndim - 2)), taken, old)

    return jax.tree.map(place, new, old)


def _where_rows[Tree](rows: Bool[Array, " B"], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _gather_rows(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _require_queryable(mixer: nnx.Module) -> QueryableMixer:
    if not isinstance(mixer, QueryableMixer):
        raise ConfigError(f"{type(mixer).__name__} cannot be asked; the memory of MemoryAsContext must be NeuralMemory")
    return mixer
