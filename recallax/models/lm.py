"""The language model: embedding, a stack of blocks by pattern, a last norm, a readout."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config, ConfigError, added
from recallax.layers.base import State
from recallax.layers.dense import parameter
from recallax.layers.norm import RMSNorm
from recallax.models.block import Block, drop
from recallax.models.coupling import Floors, cells_at
from recallax.models.landmarks import Landmarks, dropped
from recallax.models.pattern import flatten, parse
from recallax.models.placement import layer_places
from recallax.models.readout import Projection, Readout, Tied
from recallax.models.stack import Plan, Remat, Stack
from recallax.types import Aux, Precision, SeqInfo, StepInfo, check


@dataclass(frozen=True, kw_only=True)
class LMConfig(Config):
    """A model as a pattern over named blocks (`recallax.models.pattern`)."""

    d_model: int
    pattern: str
    blocks: dict[str, Block]
    vocab_size: int | None = None
    """None takes the task's."""
    readout: Readout = Tied()
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products; parameters, residual stream, recurrent states and sums over time are float32."""
    dropout: float = 0.0
    """On what each mixer adds to the residual stream."""
    embed_dropout: float = 0.0
    """On the embeddings."""
    norm_eps: float = added(1e-5)
    """Of the norms around mixers and before the readout."""
    soft_cap: float | None = added(None)
    """c of logits c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); None leaves them as they are."""
    remat: Remat = "none"
    """`block` recomputes each layer in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        parse(self.pattern, list(self.blocks))
        if self.d_model < 1:
            raise ConfigError(f"d_model is {self.d_model}; it must be at least 1")
        for name in ("dropout", "embed_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft_cap is {self.soft_cap}; it must be above 0, or None for no cap")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps is {self.norm_eps}; it must be above 0")
        if len(found := self._landmarks) > 1:
            raise ConfigError(f"layers want landmarks every {sorted(found)} tokens; a model's must agree")

    @property
    def layers(self) -> list[str]:
        """The block names layer by layer."""
        return flatten(parse(self.pattern, list(self.blocks)))

    @property
    def landmarks(self) -> int | None:
        """Tokens of a document before each landmark that the model inserts; None inserts none."""
        return next(iter(self._landmarks), None)

    @property
    def _landmarks(self) -> set[int]:
        wanted = {self.blocks[name].mixer.landmarks for name in set(self.layers)}
        return {every for every in wanted if every is not None}

    def build(self, rngs: nnx.Rngs, vocab_size: int | None = None) -> "LM":
        """The model; `vocab_size` is the task's, for configs that leave it open."""
        vocab = self.vocab_size or vocab_size
        if vocab is None:
            raise ConfigError("vocab_size is None and no task gives it; set model.vocab_size")
        if vocab_size is not None and vocab < vocab_size:
            raise ConfigError(f"model.vocab_size is {vocab}; the task has {vocab_size} token ids")
        return LM(self, vocab, rngs)


class LM(nnx.Module):
    """See the head of the file. Rows padded on the left are rolled to the right on entry and back at the end."""

    def __init__(self, config: LMConfig, vocab_size: int, rngs: nnx.Rngs):
        precision = Precision(compute=jnp.dtype(config.compute).type)
        width = config.d_model
        embedding = 0.02 * jax.random.normal(rngs.params(), (vocab_size, width), precision.param)
        self.embedding = parameter(embedding, ("vocab", "embed"))
        terms = parse(config.pattern, list(config.blocks))
        depth = sum(term.layers for term in terms)
        plan = Plan(
            config.blocks, width, depth, config.dropout, config.norm_eps, config.remat, precision, rngs.params()
        )
        self.stack = Stack(terms, plan, 0)
        places = layer_places(terms)
        coupled = any(cells_at(self, place.path) for place in places)
        self.floors = Floors(self, places, precision=precision) if coupled else None
        self.norm = RMSNorm(width, precision=precision, eps=config.norm_eps)
        self.readout = config.readout.build(width, vocab_size, precision=precision, rngs=rngs)
        every = config.landmarks
        self.landmarks = None if every is None else Landmarks(every, width, precision=precision, rngs=rngs)
        self.embed_dropout = config.embed_dropout
        self.soft_cap = config.soft_cap

    def __call__(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, at: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], Aux]:
        """Float32 logits at the row indices `at` (None: everywhere) and the modules' auxiliary means."""
        projection, aux = self.project(tokens, seq, at)
        return projection.logits(), aux

    def project(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, at: Int[Array, "B N"] | None = None
    ) -> tuple[Projection, Aux]:
        """The same before the last product."""
        self._couple()
        tokens, seq, shift = _to_right_padding(tokens, seq)
        x = self._embed(tokens, seq)
        if self.landmarks is None:
            r, aux = self.stack(x, seq, 0)
        else:
            x, layers, places = self.landmarks.insert(x, seq)
            r, aux = self.stack(x, layers, 0)
            r = dropped(r, places)
        return self._read(r, seq, at, shift), aux

    def init_state(self, batch: int, max_len: int) -> State:
        """The empty state of `batch` rows that will see at most `max_len` tokens; its bytes are the model's memory."""
        return self.stack.init_state(batch, max_len if self.landmarks is None else self.landmarks.length(max_len))

    def prefill(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, state: State, at: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], State, Aux]:
        """T >= 1 further tokens; `seq.positions` continue where the state's documents stand (0 starts afresh)."""
        self._couple()
        tokens, seq, shift = _to_right_padding(tokens, seq._replace(key=None))
        x = self._embed(tokens, seq)
        if self.landmarks is None:
            r, state, aux = self.stack.prefill(x, seq, state)
        else:
            x, layers, places = self.landmarks.insert(x, seq)
            r, state, aux = self.stack.prefill(x, layers, state)
            r = dropped(r, places)
        return self._read(r, seq, at, shift).logits(), state, aux

    def step(self, token: Int[Array, " B"], info: StepInfo, state: State) -> tuple[Float[Array, "B V"], State]:
        """One further token of each active row: float32 logits and the new state."""
        check(info)
        self._couple()
        x = self.embedding[token].astype(jnp.float32)
        r, state = self.stack.step(x, info if self.landmarks is None else self.landmarks.at(info), state)
        state = self._landmark(info, state)
        return self.read_last(r, jnp.asarray(info.position)[:, None]), state

    def _landmark(self, info: StepInfo, state: State) -> State:
        """The state after the landmark that follows this token, in rows where one does."""
        if self.landmarks is None:
            return state
        follows, x = self.landmarks.after(info), self.landmarks.rows(info.position.shape[0])
        return jax.lax.cond(follows.active.any(), lambda s: self.stack.step(x, follows, s)[1], lambda s: s, state)

    def read_last(self, r: Float[Array, "B D"], position: Int[Array, "B 1"]) -> Float[Array, "B V"]:
        """Float32 logits of what came out of the stack at one token of each row, which stands at `position`."""
        hidden = self.norm(r)
        return self._project(hidden[:, None], hidden, position).logits()[:, 0]

    def _couple(self) -> None:
        if self.floors is not None:
            self.floors.apply(self)

    def _embed(self, tokens: Int[Array, "B T"], seq: SeqInfo) -> Float[Array, "B T D"]:
        x = self.embedding[tokens].astype(jnp.float32)
        return x if seq.key is None else drop(x, self.embed_dropout, jax.random.fold_in(seq.key, 2**31 - 1))

    def _read(
        self, r: Float[Array, "B T D"], seq: SeqInfo, at: Int[Array, "B N"] | None, shift: Int[Array, " B"]
    ) -> Projection:
        length = r.shape[1]
        everywhere = jnp.arange(length)[None]
        if at is None:
            back = (everywhere - shift[:, None]) % length
            picked = jax.lax.cond(shift.any(), lambda: _rows(r, back), lambda: r)
        else:
            back = (jnp.asarray(at) - shift[:, None]) % length
            picked = _rows(r, back)
        last = jnp.max(jnp.where(jnp.asarray(seq.segments) > 0, everywhere, 0), axis=1, keepdims=True)
        summary = self.norm(_rows(r, last)[:, 0])
        positions = _rows(jnp.asarray(seq.positions), back)
        return self._project(self.norm(picked), summary, positions)

    def _project(
        self, hidden: Float[Array, "B N D"], summary: Float[Array, "B D"], at: Int[Array, "B N"]
    ) -> Projection:
        return self.readout(hidden, self.embedding[...], summary, at)._replace(soft_cap=self.soft_cap)


def _to_right_padding(tokens: Int[Array, "B T"], seq: SeqInfo) -> tuple[Int[Array, "B T"], SeqInfo, Int[Array, " B"]]:
    """Rotate each row left by its leading padding; also returns by how much."""
    check(seq)
    segments = jnp.asarray(seq.segments)
    shift = jnp.argmax(segments > 0, axis=1)
    source = (jnp.arange(segments.shape[1])[None] + shift[:, None]) % segments.shape[1]
    tokens, positions, segments, prefix = (
        _rows(jnp.asarray(x), source) for x in (tokens, seq.positions, segments, seq.prefix)
    )
    return tokens, SeqInfo(positions, segments, prefix, seq.key), shift


def _rows(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
