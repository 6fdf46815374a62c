"""Generation: prompts are read once, then tokens follow one another in one compiled loop.

    read prompts -> Standing (state, logits, position per row) -> generate -> tokens, and a Standing to go on from

A `DecodingState` is a value: it can be generated from many times, forked into more rows, and read on from. What holds, for
the same weights on the same device:

- padding on either side, the neighbours of a row, its place in the batch and the division of a generation into calls
  change nothing but rounding; draws are keyed by row and position (`sampling.py`), so they follow the row;
- a row that has stopped keeps its state bit for bit;
- within one program (the same batch, lengths and piece) a row's tokens and state are bit-equal whatever the other rows
  hold. `answer` makes all its questions one program, so an answer has the same bits whatever is asked with it, and in
  whatever order. Another batch or length is another program, and may round otherwise;
- pieces of a prompt read one after another leave what the whole prompt leaves, to rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from recallax.config import ConfigError
from recallax.layers.base import State
from recallax.layers.prefix_linear import PrefixLinearMixer
from recallax.models.lm import LM
from recallax.models.lm_head import AutoencoderModule
from recallax.models.prompts import PromptError, Prompts, TokenIds, pad_prompts, validate_prompts
from recallax.models.sampling import Greedy, Sampling, row_keys
from recallax.types import SeqInfo, StepInfo

NO_TOKEN = -1
"""Stands in `GenerationOutput.tokens` behind the end of a row that has stopped."""


class DecodingState(NamedTuple):
    """Where the documents of a batch stand."""

    model_state: State
    logits: Float[Array, "B V"]
    """Of the token that comes next, float32."""
    position: Int[Array, " B"]
    """Tokens read so far."""
    active: Bool[Array, " B"]
    """False in rows that have stopped, and in rows that hold nothing."""


class GenerationOutput(NamedTuple):
    """Tokens chosen, and where they leave the documents."""

    tokens: Int[np.ndarray, "B N"]
    """`NO_TOKEN` behind a stop token."""
    lengths: Int[np.ndarray, " B"]
    """Tokens of each row, its stop token among them."""
    state: DecodingState
    """All of them read but stop tokens: a stopped row is as it was when it stopped."""

    def sequences(self) -> list[Int[np.ndarray, " _"]]:
        """Each row's tokens without what follows its end."""
        return [row[:count] for row, count in zip(self.tokens, self.lengths, strict=True)]


class Generator:
    """A model that writes. Programs are compiled once for each batch and length, and kept."""

    def __init__(
        self, model: LM, *, max_len: int, sampling: Sampling | None = None, stop_token_ids: Sequence[int] = ()
    ):
        """max_len: tokens that a row may have, read and written, which bounds the states that grow. sampling: None is
        greedy. stop: ids that end a row. Raises ConfigError where these do not fit or the model cannot decode."""
        self.vocab_size = model.embedding.shape[0]
        if isinstance(model.readout, AutoencoderModule):
            raise ConfigError("the readout Autoencode reads the end of a row by design; a model with it cannot decode")
        if max_len < 2:
            raise ConfigError(f"max_len is {max_len}; it must be at least 2 tokens, one to read and one to write")
        for token in stop_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"stop has the token {token}; ids of this model are 0 to {self.vocab_size - 1}")
        self.max_len, self.sampling, self.stop_token_ids = max_len, sampling or Greedy(), tuple(stop_token_ids)
        readers = [module for _, module in nnx.iter_modules(model) if isinstance(module, PrefixLinearMixer)]
        self.has_prefix_layers = bool(readers)
        self.max_prefix = min((r.max_prefix_len for r in readers if r.max_prefix_len is not None), default=max_len)
        self._graphdef, self._weights = nnx.split(model)
        self._init_state_jit = jax.jit(self._init_state, static_argnums=1)
        self._batch_axes = _find_batch_axes(model, max_len)
        self._prefill_chunk_jit = jax.jit(self._prefill_chunk, donate_argnums=1)
        self._decode_loop_jit = jax.jit(self._decode_loop, static_argnums=4)

    def prefill(
        self, prompts: Prompts, state: DecodingState | None = None, chunk_size: int | None = None
    ) -> DecodingState:
        """Read one prompt per row, behind what `state` has read, which stays as it is.

        piece: read that many tokens at a time, so that the device holds a piece and a state and never the prompts;
        None reads them at once. Where a layer reads prefixes in both directions, one must fit the first piece. Rows
        that had stopped go on. Raises PromptError.
        """
        validate_prompts(prompts, self.vocab_size)
        if state is not None and len(state.position) != len(prompts.tokens):
            raise PromptError(
                f"there are {len(prompts.tokens)} prompts, and {len(state.position)} rows to go on from; `fork` these"
            )
        if chunk_size is not None and chunk_size < 1:
            raise PromptError(f"chunk_size is {chunk_size}; it must be at least 1 token")
        self._check_prefixes(prompts, state, chunk_size)
        return self._prefill(prompts, state, chunk_size)

    def generate(
        self, state: DecodingState, max_new_tokens: int, *, seed: int = 0, row_ids: Sequence[int] | None = None
    ) -> GenerationOutput:
        """Up to `max_new_tokens` further tokens of each active row; the loop ends when all rows have stopped.

        seed, rows: what draws are keyed by; `rows` are numbers that name the rows (None: 0, 1, ...), so that a row
        keeps its draws in another batch. Raises PromptError where there is no room for them.
        """
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}; it must be at least 1 token")
        self._check_max_len(np.where(state.active, state.position, 0) + max_new_tokens, "generated")
        names = np.arange(len(state.position)) if row_ids is None else np.asarray(row_ids)
        if names.shape != state.position.shape:
            raise PromptError(f"rows names {names.size} rows; there are {len(state.position)}")
        key = jax.random.key(seed)
        tokens, state = self._decode_loop_jit(self._weights, state, key, jnp.asarray(names, jnp.int32), max_new_tokens)
        tokens = np.asarray(tokens)
        return GenerationOutput(tokens, (tokens != NO_TOKEN).sum(axis=1), state)

    def fork(self, parent: DecodingState, rows: Sequence[int] | Int[np.ndarray, " N"]) -> DecodingState:
        """Those rows, each as often as it is named: a context that was read once serves many questions."""
        index, count = np.asarray(rows, np.int32), len(parent.position)
        if index.ndim != 1 or not index.size or index.min() < 0 or index.max() >= count:
            raise PromptError(f"rows to fork are {index.tolist()}; they must be row numbers from 0 to {count - 1}")
        state = jax.tree.map(lambda x, axis: jnp.take(x, index, axis=axis), parent.model_state, self._batch_axes)
        return DecodingState(state, parent.logits[index], parent.position[index], parent.active[index])

    def answer(
        self,
        context: DecodingState,
        questions: Sequence[TokenIds],
        max_new_tokens: int,
        *,
        batch_size: int = 8,
        max_question_length: int | None = None,
        seed: int = 0,
        question_ids: Sequence[int] | None = None,
    ) -> list[Int[np.ndarray, " _"]]:
        """What follows each question if it is asked behind the context, a single row, which stays as it is.

        batch: questions at a time; the last ones are filled up with empty rows. width: tokens that a question may have
        (None: as the longest here); answers are bit-equal over calls of one batch, width and `max_new_tokens`. names: numbers that
        the draws of each question are keyed by (None: 0, 1, ...). Raises PromptError.
        """
        if len(context.position) != 1:
            raise PromptError(f"the context has {len(context.position)} rows; `fork` the one that is asked")
        if batch_size < 1:
            raise PromptError(f"batch_size is {batch_size}; it must be at least 1 question")
        asked = validate_prompts(pad_prompts(questions, length=max_question_length), self.vocab_size)
        question_ids = list(range(len(questions))) if question_ids is None else list(question_ids)
        if len(question_ids) != len(questions):
            raise PromptError(f"names has {len(question_ids)} numbers for {len(questions)} questions; give one each")
        copies = self.fork(context, [0] * batch_size)
        answers: list[Int[np.ndarray, " _"]] = []
        for begin in range(0, len(questions), batch_size):
            part = jax.tree.map(lambda x, begin=begin: _pad_rows(x[begin : begin + batch_size], batch_size), asked)
            here = self._prefill(part, copies._replace(active=jnp.zeros(batch_size, bool)), None)
            rows = (question_ids[begin : begin + batch_size] + [0] * batch_size)[:batch_size]
            answers += self.generate(here, max_new_tokens, seed=seed, row_ids=rows).sequences()
        return answers[: len(questions)]

    def _prefill(self, prompts: Prompts, state: DecodingState | None, chunk_size: int | None) -> DecodingState:
        """The same, where rows may be empty: these stay as they are."""
        rows, length = prompts.tokens.shape
        before = np.zeros(rows, np.int64) if state is None else np.asarray(state.position)
        self._check_max_len(before + prompts.lengths, "read")
        if state is None:
            here = DecodingState(
                self._init_state_jit(self._weights, rows),
                jnp.zeros((rows, self.vocab_size)),
                jnp.zeros(rows, jnp.int32),
                jnp.zeros(rows, bool),
            )
        else:
            here = state
        here = jax.tree.map(
            jnp.copy, here._replace(active=here.active | (prompts.lengths > 0))
        )  # `_prefill_chunk_jit` uses it up
        if chunk_size is not None and chunk_size < length:
            tokens, seq = pad_prompts(
                [row[valid] for row, valid in zip(prompts.tokens, prompts.valid, strict=True)],
                prefix_lengths=prompts.prefix_lengths.tolist(),
                length=-(-int(prompts.lengths.max()) // chunk_size) * chunk_size,
            )
            prompts, length = Prompts(tokens, seq), tokens.shape[1]
        for begin in range(0, length, chunk_size or length):
            here = self._prefill_chunk_jit(
                self._weights,
                here,
                *(part[:, begin : begin + (chunk_size or length)] for part in _prefill_arrays(prompts)),
            )
        if not bool(jnp.isfinite(here.logits).all()):
            row = int(jnp.argmin(jnp.isfinite(here.logits).all(axis=1)))
            raise FloatingPointError(f"the logits behind prompt {row} are not finite; look at the model's weights")
        return here

    def _init_state(self, weights: nnx.State, batch_size: int) -> State:
        return nnx.merge(self._graphdef, weights).init_state(batch_size, self.max_len)

    def _prefill_chunk(
        self,
        weights: nnx.State,
        here: DecodingState,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        prefix: Bool[Array, "B T"],
    ) -> DecodingState:
        place = jnp.arange(tokens.shape[1])[None]
        count, last = valid.sum(axis=1), jnp.max(jnp.where(valid, place, 0), axis=1)
        positions = here.position[:, None] + place - jnp.argmax(valid, axis=1)[:, None]
        positions = jnp.where(valid, positions, here.position[:, None])
        seq = SeqInfo(positions, valid.astype(jnp.int32), prefix)
        model = nnx.merge(self._graphdef, weights)
        logits, state, _ = model.prefill(tokens, seq, here.model_state, last[:, None])
        logits = jnp.where((count > 0)[:, None], logits[:, 0], here.logits)
        return DecodingState(state, logits, here.position + count, here.active)

    def _decode_loop(
        self, weights: nnx.State, here: DecodingState, key: PRNGKeyArray, row_ids: Int[Array, " B"], max_new_tokens: int
    ) -> tuple[Int[Array, "B N"], DecodingState]:
        stop = jnp.array(self.stop_token_ids, jnp.int32)

        def going(carry: tuple) -> Bool[Array, ""]:
            step, _, here = carry
            return (step < max_new_tokens) & here.active.any()

        def body(carry: tuple) -> tuple:
            step, tokens, here = carry
            drawn = self.sampling.sample(here.logits, row_keys(key, row_ids, here.position))
            tokens = tokens.at[:, step].set(jnp.where(here.active, drawn, NO_TOKEN))
            active = here.active & ~(drawn[:, None] == stop[None]).any(axis=1)
            # Merged here: what a model changes of itself in a step belongs to the step.
            logits, state = nnx.merge(self._graphdef, weights).step(
                drawn, StepInfo(here.position, active), here.model_state
            )
            logits = jnp.where(active[:, None], logits, here.logits)
            return step + 1, tokens, DecodingState(state, logits, here.position + active.astype(jnp.int32), active)

        tokens = jnp.full((len(row_ids), max_new_tokens), NO_TOKEN, jnp.int32)
        _, tokens, here = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), tokens, here))
        return tokens, here

    def _check_max_len(self, ends: Int[np.ndarray, " B"], what: str) -> None:
        row = int(ends.argmax())
        if ends[row] > self.max_len:
            raise PromptError(
                f"row {row} would have {ends[row]} tokens when all are {what}; max_len is {self.max_len}: raise it, or "
                f"ask for {ends[row] - self.max_len} fewer"
            )

    def _check_prefixes(self, prompts: Prompts, state: DecodingState | None, chunk_size: int | None) -> None:
        row = int(prompts.prefix_lengths.argmax())
        size = int(prompts.prefix_lengths[row])
        if state is not None and size and bool((np.asarray(state.position) > 0)[prompts.prefix_lengths > 0].any()):
            raise PromptError(f"prompt {row} has a prefix of {size} tokens; a document that goes on can have none")
        if size > self.max_prefix:
            raise PromptError(
                f"the prefix of prompt {row} is {size} tokens; this model reads at most {self.max_prefix} as a prefix"
            )
        if chunk_size is not None and size > chunk_size and self.has_prefix_layers:
            raise PromptError(
                f"the prefix of prompt {row} is {size} tokens, which must be read at once, and chunk_size is {chunk_size}: make "
                f"it as long, or the prefix shorter"
            )


def _prefill_arrays(
    prompts: Prompts,
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    return prompts.tokens, prompts.valid, np.asarray(prompts.seq.prefix) & prompts.valid


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """With rows of zeros behind, up to that many: they are padding."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def _find_batch_axes(model: LM, max_len: int) -> State:
    """Which axis of each leaf of a state counts rows; in repeated layers others stand before it."""
    two, three = (jax.eval_shape(lambda n=n: model.init_state(n, max_len)) for n in (2, 3))
    return jax.tree.map(lambda a, b: [x != y for x, y in zip(a.shape, b.shape, strict=True)].index(True), two, three)
