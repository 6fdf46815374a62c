"""Memory as a context (MAC): attention over a segment reads what a memory answered, and the memory learns what it saw.

    h = recall(M_start, questions)             M_start: the memory as the segment found it
    y = rms(W_o attention over [persistent | h | segment])
    r, M = memory(y)                           which learns while it reads y
    o = y * silu(rms(r))

Segments follow one another, for the questions to each need the memory after the one before. As printed, the answers to
all of a segment's tokens stand before its first one, and the gate reads the memory after its last: both tell the
future. Here r_i is read of the memory after token i, and there are three ways of asking:

    own         token i asks, and is heard by tokens from i on; as many answers as tokens
    previous    the tokens of the segment before ask, averaged down to `retrieved` questions; none in the first segment
    learned     `retrieved` questions that are parameters

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
from recallax.layers.base import MixerConfig, RecallMixer, RecurrentMixer, Site, State
from recallax.layers.continuation import continued, started, zero_rows
from recallax.layers.dense import parameter
from recallax.layers.norm import RMSNorm
from recallax.layers.softmax import SoftmaxMixer
from recallax.pallas_kernels.window_attention import KVCache, masked_attention
from recallax.types import Aux, Precision, SeqInfo, StepInfo

type Query = Literal["own", "previous", "learned"]


@dataclass(frozen=True, kw_only=True)
class MemoryAsContext(MixerConfig):
    """See the head of the file. Raises ConfigError where the grids do not fit."""

    memory: MixerConfig
    """One that can be asked: NeuralMemory."""
    segment: int = 512
    """Tokens that attend to one another."""
    query: Query = "own"
    retrieved: int = 256
    """Questions per segment of `previous`, which averages over segment / retrieved tokens, and of `learned`."""
    persistent: int = 128
    """Learned tokens that every token sees besides."""
    heads: int = 1
    kv_heads: int | None = None
    """Key/value heads shared by groups of query heads; None is one per query head."""
    head_dim: int | None = None
    """Width of a head; None is d_model / heads."""
    rotary_base: float | None = 10_000.0
    """Base of the rotary embedding; None leaves positions out."""

    def __post_init__(self) -> None:
        if self.segment < 1 or self.segment % self.memory.grid:
            raise ConfigError(
                f"segment is {self.segment} tokens; it must be a multiple of the memory's chunk of {self.memory.grid}"
            )
        if self.query != "own" and self.retrieved < 1:
            raise ConfigError(f"retrieved is {self.retrieved}; it must be at least 1 question")
        if self.query == "previous" and self.segment % self.retrieved:
            raise ConfigError(f"retrieved is {self.retrieved}; it must divide the segment of {self.segment} tokens")

    @property
    def grid(self) -> int:
        return self.segment

    def build(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "MemoryAsContextMixer":
        return MemoryAsContextMixer(self, d_model, site, precision=precision, rngs=rngs)


class Segment(NamedTuple):
    """What the tokens of an unfinished segment may see; zeros beyond them, and zeros between segments."""

    start: State | None
    """What the memory held before it (`own`)."""
    tokens: KVCache
    answers: KVCache


class MemoryAsContextState(NamedTuple):
    """See the head of the file."""

    memory: State
    inputs: Float[Array, "B N D"] | None
    """Sums of the segment's inputs, to be the next one's questions (`previous`)."""
    segment: Segment | None
    """None only inside a call, whose pieces are whole: nothing of them need be kept."""


class MemoryAsContextMixer(RecurrentMixer):
    """See the head of the file."""

    def __init__(self, config: MemoryAsContext, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs):
        self.segment, self.width = config.segment, d_model
        self.query: Query = config.query
        self.answers = config.segment if config.query == "own" else config.retrieved
        self.attention = SoftmaxMixer(
            d_model,
            heads=config.heads,
            kv_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim,
            window=None,
            rotary_base=config.rotary_base,
            persistent=config.persistent,
            depth=site.depth,
            precision=precision,
            rngs=rngs,
        )
        self.memory = _asked(config.memory.build(d_model, site, precision=precision, rngs=rngs))
        asked = jax.random.normal(rngs.params(), (config.retrieved, d_model), precision.param)
        self.questions = parameter(asked, (None, "embed"), decay=False) if config.query == "learned" else None
        self.attention_norm, self.memory_norm = (RMSNorm(d_model, precision=precision) for _ in range(2))

    def __call__(self, x: Float[Array, "B T D"], seq: SeqInfo) -> tuple[Float[Array, "B T D"], Aux]:
        empty = self.init_state(x.shape[0], x.shape[1])
        y, _, aux = self._pieces(x, seq, empty._replace(segment=None))
        return y, aux

    def init_state(self, batch: int, max_len: int) -> MemoryAsContextState:
        memory = self.memory.init_state(batch, max_len)
        tokens = self.attention.init_state(batch, min(self.segment, max_len))
        answers = tokens if self.query == "own" else self.attention.init_state(batch, self.answers)
        start = jax.tree.map(jnp.zeros_like, self.memory.held(memory)) if self.query == "own" else None
        inputs = jnp.zeros((batch, self.answers, self.width), jnp.float32) if self.query == "previous" else None
        return MemoryAsContextState(memory, inputs, Segment(start, tokens, answers))

    def prefill(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B T D"], MemoryAsContextState, Aux]:
        return self._pieces(x, seq, continued(state, seq))

    def step(
        self, x: Float[Array, "B D"], info: StepInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B D"], MemoryAsContextState]:
        active, position = jnp.asarray(info.active), jnp.asarray(info.position)[:, None]
        seq = SeqInfo(position, active.astype(jnp.int32)[:, None], jnp.zeros(position.shape, bool))
        state, (y, _, _) = self._piece(started(state, info), (x[:, None], seq))
        return jnp.where(active[:, None], y[:, 0], 0), state

    def _pieces(
        self, x: Float[Array, "B T D"], seq: SeqInfo, state: MemoryAsContextState
    ) -> tuple[Float[Array, "B T D"], MemoryAsContextState, Aux]:
        """Piece by piece, each of one segment; the first ends where the row's unfinished segment does."""
        length = x.shape[1]
        positions, segments = jnp.asarray(seq.positions), jnp.asarray(seq.segments)
        begun = jnp.zeros_like(positions[:, 0]) if state.segment is None else positions[:, 0] % self.segment
        width, before = min(self.segment, length), self.segment - 1 if state.segment is not None else 0
        count = -(-(length + before) // self.segment)
        first = jnp.maximum(jnp.arange(count)[:, None] * self.segment - begun[None], 0)  # [N, B]
        last = jnp.minimum(jnp.arange(1, count + 1)[:, None] * self.segment - begun[None], length)
        source = first[..., None] + jnp.arange(width)[None, None]
        inside = source < last[..., None]
        source = jnp.minimum(source, length - 1)

        def cut(a: Array) -> Array:
            return jax.vmap(lambda index: _rows(a, index))(source)

        parts = SeqInfo(cut(positions), jnp.where(inside, cut(segments), 0), jnp.zeros(inside.shape, bool))
        state, (y, aux, wrong) = jax.lax.scan(jax.checkpoint(self._piece), state, (cut(x), parts))
        # Token t is the (t + begun)-th after the beginning of the row's first segment.
        place = begun[:, None] + jnp.arange(length)[None]
        number = place // self.segment
        slot = jnp.where(number == 0, place - begun[:, None], place % self.segment)
        y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], count * width, -1)
        y = _rows(y, number * width + slot)
        y = jnp.where(wrong.any(axis=0)[:, None, None], jnp.full_like(y, jnp.nan), y)
        return y, state, jax.tree.map(lambda a: a.sum(axis=0), aux)

    def _piece(
        self, state: MemoryAsContextState, part: tuple[Array, SeqInfo]
    ) -> tuple[MemoryAsContextState, tuple[Array, Aux, Array]]:
        """Tokens that belong to one segment, in rows that begin with them."""
        x, seq = part
        positions, valid = jnp.asarray(seq.positions), jnp.asarray(seq.segments) > 0
        memory, inputs, segment = zero_rows(state, valid[:, 0] & (positions[:, 0] == 0))
        begun = jnp.zeros_like(positions[:, 0]) if segment is None else positions[:, 0] % self.segment
        slots = begun[:, None] + jnp.arange(x.shape[1])[None]
        opened = self._opened(x, slots, memory, inputs, segment)
        y = self._attention(x, slots, positions[:, 0] >= self.segment, opened)
        read, memory, aux = self.memory.prefill(y, seq, memory)
        gate = jax.nn.silu(self.memory_norm(read).astype(jnp.float32))
        out = (y.astype(jnp.float32) * gate).astype(y.dtype)

        end = begun + valid.sum(axis=1)
        on_grid = valid[:, :1] & (positions == positions[:, :1] + jnp.arange(x.shape[1])[None])
        on_grid &= positions[:, :1] % self.segment == begun[:, None]
        if inputs is not None:
            inputs = jnp.where((begun == 0)[:, None, None], 0, inputs) + self._summed(x, begun, end)
        new = MemoryAsContextState(memory, inputs, None if segment is None else self._kept(opened, end))
        return _where(valid[:, 0], new, state), (out, aux, (valid & ~on_grid).any(axis=1))

    def _opened(
        self,
        x: Float[Array, "B N D"],
        slots: Int[Array, "B N"],
        memory: State,
        inputs: Float[Array, "B M D"] | None,
        segment: Segment | None,
    ) -> Segment:
        """The segment with these tokens in it: keys, values, and answers."""
        begun, held = slots[:, 0], self.memory.held(memory)
        begins = begun == 0
        _, *new = self.attention.project(x, slots)
        tokens = KVCache(*new) if segment is None else _placed(KVCache(*new), segment.tokens, begun)
        if self.query == "own":
            if segment is not None:
                held = _where(begins, held, segment.start)
            answers = self._answers(x, held)
            return Segment(held, tokens, answers if segment is None else _placed(answers, segment.answers, begun))
        if self.questions is not None:
            questions = jnp.broadcast_to(self.questions[...][None], (x.shape[0], *self.questions.shape))
        else:
            assert inputs is not None
            questions = inputs * (self.answers / self.segment)
        questions = questions.astype(x.dtype)
        if segment is None:
            return Segment(None, tokens, self._answers(questions, held))
        # Most steps are within a segment, whose answers are known.
        answers = jax.lax.cond(begins.any(), lambda: self._answers(questions, held), lambda: segment.answers)
        return Segment(None, tokens, _where(begins, answers, segment.answers))

    def _answers(self, questions: Float[Array, "B N D"], held: State) -> KVCache:
        return KVCache(*self.attention.unplaced(self.memory.recall(questions, held)))

    def _attention(
        self, x: Float[Array, "B N D"], slots: Int[Array, "B N"], later: Bool[Array, " B"], segment: Segment
    ) -> Float[Array, "B N D"]:
        q, _, _ = self.attention.project(x, slots)
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(segment.answers, segment.tokens, strict=True))
        heard = visible_answers(self.query, slots, segment.answers.k.shape[1], later)
        visible = jnp.concatenate([heard, _earlier(slots, segment.tokens.k.shape[1])], axis=2)
        y = masked_attention(q, k, v, visible, persistent=self.attention.always())
        return self.attention_norm(self.attention.out(y.reshape(*x.shape[:-1], -1)))

    def _summed(
        self, x: Float[Array, "B N D"], begun: Int[Array, " B"], end: Int[Array, " B"]
    ) -> Float[Array, "B M D"]:
        """Sums of the inputs over each question's stretch of the segment."""
        slots = jnp.zeros((x.shape[0], self.segment, self.width), jnp.float32)
        placed = _placed(x.astype(jnp.float32), slots, begun)
        placed = jnp.where((jnp.arange(self.segment)[None] < end[:, None])[..., None], placed, 0)
        return placed.reshape(x.shape[0], self.answers, -1, self.width).sum(axis=2)

    def _kept(self, segment: Segment, end: Int[Array, " B"]) -> Segment:
        """What a segment of `end` tokens leaves for the next ones: nothing where it is full."""
        unfinished = end < self.segment

        def filled(x: Array) -> Array:
            seen = (jnp.arange(x.shape[1])[None] < end[:, None]) & unfinished[:, None]
            return jnp.where(seen[..., None, None], x, 0)

        start, tokens, answers = segment
        tokens = jax.tree.map(filled, tokens)
        answers = jax.tree.map(filled, answers) if self.query == "own" else zero_rows(answers, ~unfinished)
        return Segment(zero_rows(start, ~unfinished), tokens, answers)


def visible_answers(
    query: Query, slots: Int[Array, "B N"], count: int, later: Bool[Array, " B"]
) -> Bool[Array, "B N M"]:
    """Which answers a token hears; `later`: the row's segment is not its document's first."""
    if query == "own":
        return _earlier(slots, count)
    heard = later if query == "previous" else jnp.ones_like(later)
    return jnp.broadcast_to(heard[:, None, None], (*slots.shape, count))


def _earlier(slots: Int[Array, "B N"], count: int) -> Bool[Array, "B N S"]:
    return jnp.arange(count)[None, None] <= slots[..., None]


def _placed[Tree](new: Tree, old: Tree, begun: Int[Array, " B"]) -> Tree:
    """Slots [B, S, ...] whose first ones are old and whose next are new [B, N, ...]."""

    def place(new: Array, old: Array) -> Array:
        source = jnp.arange(old.shape[1])[None] - begun[:, None]
        taken = _rows(new, jnp.clip(source, 0, new.shape[1] - 1)).astype(old.dtype)
        return jnp.where((source >= 0).reshape(*source.shape, *[1] * (old.ndim - 2)), taken, old)

    return jax.tree.map(place, new, old)


def _where[Tree](rows: Bool[Array, " B"], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _rows(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _asked(mixer: nnx.Module) -> RecallMixer:
    if not isinstance(mixer, RecallMixer):
        raise ConfigError(f"{type(mixer).__name__} cannot be asked; the memory of MemoryAsContext must be NeuralMemory")
    return mixer
