"""The language model: embedding, a stack of blocks by pattern, a last norm, a readout."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config, ConfigError, added_field
from recallax.layers.base import State
from recallax.layers.dense import parameter
from recallax.layers.norm import RMSNorm
from recallax.models.block import Block, dropout
from recallax.models.hgrn2_lower_bounds import HGRN2LowerBounds, hgrn2_cells_at
from recallax.models.landmark_tokens import LandmarkTokens, drop_landmarks
from recallax.models.lm_head import LMHead, LogitProjection, Tied
from recallax.models.parameter_paths import layer_paths
from recallax.models.pattern import Term, flatten_pattern, parse_pattern
from recallax.models.stack import Remat, Stack, StackSpec
from recallax.types import Aux, Precision, SeqInfo, StepInfo, check_shapes


@dataclass(frozen=True, kw_only=True)
class LMConfig(Config):
    """A model as a pattern over named blocks (`recallax.models.pattern`)."""

    d_model: int
    pattern: str
    blocks: dict[str, Block]
    vocab_size: int | None = None
    """None takes the task's."""
    lm_head: LMHead = Tied()
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products; parameters, residual stream, recurrent states and sums over time are float32."""
    dropout: float = 0.0
    """On what each mixer adds to the residual stream."""
    embed_dropout: float = 0.0
    """On the embeddings."""
    norm_eps: float = added_field(1e-5)
    """Of the norms around mixers and before the readout."""
    soft_cap: float | None = added_field(None)
    """c of logits c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); None leaves them as they are."""
    remat: Remat = "none"
    """`block` recomputes each layer in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        parse_pattern(self.pattern, list(self.blocks))
        if self.d_model < 1:
            raise ConfigError(f"d_model is {self.d_model}; it must be at least 1")
        for name, value in (("dropout", self.dropout), ("embed_dropout", self.embed_dropout)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 0 and below 1")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft_cap is {self.soft_cap}; it must be above 0, or None for no cap")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps is {self.norm_eps}; it must be above 0")
        if len(found := self._landmark_block_sizes) > 1:
            raise ConfigError(f"layers want landmarks every {sorted(found)} tokens; a model's must agree")

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parsed pattern."""
        return parse_pattern(self.pattern, list(self.blocks))

    @property
    def layer_names(self) -> list[str]:
        """The name of the block of each layer."""
        return flatten_pattern(self.terms)

    @property
    def landmark_block_size(self) -> int | None:
        """Tokens of a document before each landmark that the model inserts; None inserts none."""
        return next(iter(self._landmark_block_sizes), None)

    @property
    def _landmark_block_sizes(self) -> set[int]:
        wanted = {self.blocks[name].mixer.landmark_interval for name in set(self.layer_names)}
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
        precision = Precision(compute=jnp.dtype(config.compute_dtype).type)
        width = config.d_model
        embedding = 0.02 * jax.random.normal(rngs.params(), (vocab_size, width), precision.param)
        self.embedding = parameter(embedding, ("vocab", "embed"))
        terms = parse_pattern(config.pattern, list(config.blocks))
        depth = sum(term.num_layers for term in terms)
        plan = StackSpec(
            config.blocks, width, depth, config.dropout, config.norm_eps, config.remat, precision, rngs.params()
        )
        self.stack = Stack(terms, plan, 0)
        places = layer_paths(terms)
        coupled = any(hgrn2_cells_at(self, place.path) for place in places)
        self.floors = HGRN2LowerBounds(self, places, precision=precision) if coupled else None
        self.norm = RMSNorm(width, precision=precision, eps=config.norm_eps)
        self.readout = config.lm_head.build(width, vocab_size, precision=precision, rngs=rngs)
        every = config.landmark_block_size
        self.landmarks = None if every is None else LandmarkTokens(every, width, precision=precision, rngs=rngs)
        self.embed_dropout = config.embed_dropout
        self.soft_cap = config.soft_cap

    def __call__(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], Aux]:
        """Float32 logits at the row indices `at` (None: everywhere) and the modules' auxiliary means."""
        projection, aux = self.logit_projection(tokens, seq, logit_indices)
        return projection.logits(), aux

    def logit_projection(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[LogitProjection, Aux]:
        """The same before the last product."""
        self.apply_lower_bounds()
        tokens, seq, shift = _to_right_padding(tokens, seq)
        x = self._embed(tokens, seq)
        if self.landmarks is None:
            r, aux = self.stack(x, seq, 0)
        else:
            x, layers, places = self.landmarks.insert(x, seq)
            r, aux = self.stack(x, layers, 0)
            r = drop_landmarks(r, places)
        return self._project_at(r, seq, logit_indices, shift), aux

    def init_state(self, batch: int, max_len: int) -> State:
        """The empty state of `batch` rows that will see at most `max_len` tokens; its bytes are the model's memory."""
        return self.stack.init_state(
            batch, max_len if self.landmarks is None else self.landmarks.expanded_length(max_len)
        )

    def prefill(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, state: State, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], State, Aux]:
        """T >= 1 further tokens; `seq.positions` continue where the state's documents stand (0 starts afresh)."""
        self.apply_lower_bounds()
        tokens, seq, shift = _to_right_padding(tokens, seq._replace(key=None))
        x = self._embed(tokens, seq)
        if self.landmarks is None:
            r, state, aux = self.stack.prefill(x, seq, state)
        else:
            x, layers, places = self.landmarks.insert(x, seq)
            r, state, aux = self.stack.prefill(x, layers, state)
            r = drop_landmarks(r, places)
        return self._project_at(r, seq, logit_indices, shift).logits(), state, aux

    def step(self, token: Int[Array, " B"], info: StepInfo, state: State) -> tuple[Float[Array, "B V"], State]:
        """One further token of each active row: float32 logits and the new state."""
        check_shapes(info)
        self.apply_lower_bounds()
        x = self.embedding[token].astype(jnp.float32)
        r, state = self.stack.step(x, info if self.landmarks is None else self.landmarks.token_step_info(info), state)
        state = self._landmark_step(info, state)
        return self.last_token_logits(r, jnp.asarray(info.position)[:, None]), state

    def _landmark_step(self, info: StepInfo, state: State) -> State:
        """The state after the landmark that follows this token, in rows where one does."""
        if self.landmarks is None:
            return state
        follows, x = self.landmarks.landmark_step_info(info), self.landmarks.embedding_rows(info.position.shape[0])
        return jax.lax.cond(follows.active.any(), lambda s: self.stack.step(x, follows, s)[1], lambda s: s, state)

    def last_token_logits(self, r: Float[Array, "B D"], position: Int[Array, "B 1"]) -> Float[Array, "B V"]:
        """Float32 logits of what came out of the stack at one token of each row, which stands at `position`."""
        hidden = self.norm(r)
        return self._apply_lm_head(hidden[:, None], hidden, position).logits()[:, 0]

    def apply_lower_bounds(self) -> None:
        if self.floors is not None:
            self.floors.apply(self)

    def _embed(self, tokens: Int[Array, "B T"], seq: SeqInfo) -> Float[Array, "B T D"]:
        x = self.embedding[tokens].astype(jnp.float32)
        return x if seq.key is None else dropout(x, self.embed_dropout, jax.random.fold_in(seq.key, 2**31 - 1))

    def _project_at(
        self, r: Float[Array, "B T D"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None, shift: Int[Array, " B"]
    ) -> LogitProjection:
        length = r.shape[1]
        everywhere = jnp.arange(length)[None]
        if logit_indices is None:
            back = (everywhere - shift[:, None]) % length
            picked = jax.lax.cond(shift.any(), lambda: _gather_tokens(r, back), lambda: r)
        else:
            back = (jnp.asarray(logit_indices) - shift[:, None]) % length
            picked = _gather_tokens(r, back)
        last = jnp.max(jnp.where(jnp.asarray(seq.segment_ids) > 0, everywhere, 0), axis=1, keepdims=True)
        summary = self.norm(_gather_tokens(r, last)[:, 0])
        positions = _gather_tokens(jnp.asarray(seq.positions), back)
        return self._apply_lm_head(self.norm(picked), summary, positions)

    def _apply_lm_head(
        self, hidden: Float[Array, "B N D"], last_hidden: Float[Array, "B D"], positions: Int[Array, "B N"]
    ) -> LogitProjection:
        return self.readout(hidden, self.embedding[...], last_hidden, positions)._replace(soft_cap=self.soft_cap)


def _to_right_padding(tokens: Int[Array, "B T"], seq: SeqInfo) -> tuple[Int[Array, "B T"], SeqInfo, Int[Array, " B"]]:
    """Rotate each row left by its leading padding; also returns by how much."""
    check_shapes(seq)
    segments = jnp.asarray(seq.segment_ids)
    shift = jnp.argmax(segments > 0, axis=1)
    source = (jnp.arange(segments.shape[1])[None] + shift[:, None]) % segments.shape[1]
    tokens, positions, segments, prefix = (
        _gather_tokens(jnp.asarray(x), source) for x in (tokens, seq.positions, segments, seq.prefix)
    )
    return tokens, SeqInfo(positions, segments, prefix, seq.key), shift


def _gather_tokens(x: Array, index: Int[Array, "B N"]) -> Array:
    """x[b, index[b, n]] for every row b."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
