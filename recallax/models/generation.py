"""Autoregressive generation: prompts are read once, then tokens are generated in one compiled loop.

    prompts -> prefill -> DecodingState (model state, logits and position per row) -> generate -> tokens, DecodingState

A `DecodingState` is a value: it can be generated from repeatedly, forked into more rows, and continued with further
prompts. For the same weights on the same device:

- padding on either side, the other rows, a row's place in the batch and the division of a generation into calls change
  results only by rounding; samples are keyed by row and position (`sampling.py`), so they follow the row;
- a row that has stopped keeps its state bit for bit;
- within one program (the same batch size, lengths and chunk size) the tokens and the state of a row are bit-equal
  whatever the other rows contain. `Generator.answer` runs all questions in one program, so an answer has the same bits
  whatever the other questions and their order. Another batch size or length is another program and may round otherwise;
- reading a prompt in chunks gives the state of the whole prompt, up to rounding.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from recallax.config import ConfigError
from recallax.layers.base import State
from recallax.layers.prefix_linear import PrefixLinearMixer
from recallax.models.decoding import (
    NO_TOKEN,
    DecodingState,
    GenerationOutput,
    NonFiniteLogitsError,
    decode_loop,
    find_batch_axes,
    prefill_chunk,
)
from recallax.models.document_limits import DocumentLayoutError
from recallax.models.lm import LM
from recallax.models.lm_head import AutoencoderModule
from recallax.models.prompts import PromptError, Prompts, TokenIds, pad_prompts, validate_prompts
from recallax.models.sampling import Greedy, Sampling

__all__ = ["NO_TOKEN", "DecodingState", "GenerationOutput", "Generator", "NonFiniteLogitsError"]


class Generator:
    """Autoregressive generator. Each program is compiled once per batch size and length, and kept.

    Args:
        model: The language model.
        max_len: Largest number of tokens per row, read and generated, which bounds states that grow.
        sampling: The rule that selects tokens. None: greedy.
        stop_token_ids: Tokens that end a row.

    Raises:
        ConfigError: If the model cannot decode, or a value is out of range.
    """

    def __init__(
        self, model: LM, *, max_len: int, sampling: Sampling | None = None, stop_token_ids: Sequence[int] = ()
    ):
        self.vocab_size = model.embedding.shape[0]
        if isinstance(model.readout, AutoencoderModule):
            raise ConfigError("the Autoencoder head reads the end of a row by design; a model with it cannot decode")
        if max_len < 2:
            raise ConfigError(f"max_len is {max_len}; it must be at least 2 tokens, one to read and one to generate")
        for token in stop_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"stop_token_ids has the token {token}; ids of this model are 0 to {self.vocab_size - 1}"
                )
        self.max_len, self.sampling, self.stop_token_ids = max_len, sampling or Greedy(), tuple(stop_token_ids)
        self.has_prefix_layers = any(isinstance(module, PrefixLinearMixer) for _, module in nnx.iter_modules(model))
        self.document_limits = model.document_limits
        graphdef, self._weights = nnx.split(model)
        self._batch_axes = find_batch_axes(model, max_len)
        self._init_state_jit = jax.jit(
            lambda weights, batch_size: nnx.merge(graphdef, weights).init_state(batch_size, max_len), static_argnums=1
        )
        self._prefill_chunk_jit = jax.jit(functools.partial(prefill_chunk, graphdef), donate_argnums=1)
        self._decode_loop_jit = jax.jit(
            functools.partial(decode_loop, graphdef, self.sampling, self.stop_token_ids), static_argnums=4
        )

    def prefill(
        self, prompts: Prompts, state: DecodingState | None = None, chunk_size: int | None = None
    ) -> DecodingState:
        """Read one prompt per row.

        Args:
            prompts: The prompts.
            state: The state that the prompts continue; it is not modified. Stopped rows become active. None: empty.
            chunk_size: Tokens that are read at a time, so that the device never holds the whole prompts; a prefix that
                a layer reads in both directions must fit into the first chunk. None: all at once.

        Returns:
            The state after the prompts.

        Raises:
            PromptError: If the prompts are invalid, do not match the state, or exceed `max_len`.
            NonFiniteLogitsError: If logits are not finite.
        """
        validate_prompts(prompts, self.vocab_size)
        if state is not None and len(state.position) != len(prompts.tokens):
            raise PromptError(
                f"there are {len(prompts.tokens)} prompts for a state of {len(state.position)} rows; `fork` the state"
            )
        if chunk_size is not None and chunk_size < 1:
            raise PromptError(f"chunk_size is {chunk_size}; it must be at least 1 token")
        self._check_prefixes(prompts, state, chunk_size)
        return self._prefill(prompts, state, chunk_size)

    def generate(
        self, state: DecodingState, max_new_tokens: int, *, seed: int = 0, row_ids: Sequence[int] | None = None
    ) -> GenerationOutput:
        """Generate tokens in each active row until all rows have stopped.

        Args:
            state: The state after the prompts; it is not modified.
            max_new_tokens: Largest number of tokens per row.
            seed: Seed of the samples, from 0 to 2^32 - 1.
            row_ids: Ids that key the samples of each row, from 0 to 2^31 - 1, so that a row keeps its samples in
                another batch. None: 0, 1, and so on.

        Returns:
            The tokens, and the state after them.

        Raises:
            PromptError: If a row would exceed `max_len`, an argument is out of range, or the arguments do not match the
                state.
            NonFiniteLogitsError: If logits are not finite.
        """
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}; it must be at least 1 token")
        self._check_max_len(np.where(state.active, state.position, 0) + max_new_tokens, "generation")
        ids = np.arange(len(state.position)) if row_ids is None else np.asarray(row_ids)
        if ids.shape != state.position.shape:
            raise PromptError(f"row_ids has {ids.size} ids for {len(state.position)} rows; give one per row")
        _check_range("seed", seed, 2**32)
        for row_id in ids.tolist():
            _check_range("a row id", row_id, 2**31)
        key, ids = jax.random.key(seed), jnp.asarray(ids, jnp.int32)
        tokens, state, finite = self._decode_loop_jit(self._weights, state, key, ids, max_new_tokens)
        if not finite.all():
            raise NonFiniteLogitsError(
                f"logits of row {int(jnp.argmin(finite))} are not finite after generated tokens; check the model's "
                "weights"
            )
        tokens = np.asarray(tokens)
        return GenerationOutput(tokens, (tokens != NO_TOKEN).sum(axis=1), state)

    def fork(self, parent: DecodingState, rows: Sequence[int] | Int[np.ndarray, " N"]) -> DecodingState:
        """Copy rows of a state, so that a context that was read once can be continued in several ways.

        Args:
            parent: The state; it is not modified.
            rows: Row numbers; a number may be repeated.

        Returns:
            A state of these rows.

        Raises:
            PromptError: If a row does not exist.
        """
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
        """Generate a continuation of the context for each question.

        Args:
            context: A state of one row; it is not modified.
            questions: Token ids of each question.
            max_new_tokens: Largest number of tokens per answer.
            batch_size: Questions per batch; the last batch is filled up with empty rows.
            max_question_length: Length to which questions are padded. None: that of the longest. Answers are bit-equal
                in calls with equal `batch_size`, `max_question_length` and `max_new_tokens`.
            seed: Seed of the samples.
            question_ids: Ids that key the samples of each question. None: 0, 1, and so on.

        Returns:
            Token ids of each answer, including its stop token.

        Raises:
            PromptError: If the context has several rows, or an argument is invalid.
        """
        if len(context.position) != 1:
            raise PromptError(f"the context has {len(context.position)} rows; `fork` one of them")
        if batch_size < 1:
            raise PromptError(f"batch_size is {batch_size}; it must be at least 1 question")
        prompts = validate_prompts(pad_prompts(questions, length=max_question_length), self.vocab_size)
        question_ids = list(range(len(questions))) if question_ids is None else list(question_ids)
        if len(question_ids) != len(questions):
            raise PromptError(
                f"question_ids has {len(question_ids)} ids for {len(questions)} questions; give one per question"
            )
        copies = self.fork(context, [0] * batch_size)._replace(active=jnp.zeros(batch_size, bool))
        answers: list[Int[np.ndarray, " _"]] = []
        for start in range(0, len(questions), batch_size):
            batch = jax.tree.map(lambda x, i=start: _pad_rows(x[i : i + batch_size], batch_size), prompts)
            ids = (question_ids[start : start + batch_size] + [0] * batch_size)[:batch_size]
            state = self._prefill(batch, copies, None)
            answers += self.generate(state, max_new_tokens, seed=seed, row_ids=ids).sequences()
        return answers[: len(questions)]

    def _prefill(self, prompts: Prompts, state: DecodingState | None, chunk_size: int | None) -> DecodingState:
        """Read prompts of which some may be empty; rows with an empty prompt do not change."""
        num_rows, length = prompts.tokens.shape
        before = np.zeros(num_rows, np.int64) if state is None else np.asarray(state.position)
        self._check_max_len(before + prompts.lengths, "prefill")
        current = self._empty_state(num_rows) if state is None else state
        # `_prefill_chunk_jit` donates the state, so it gets a copy.
        current = jax.tree.map(jnp.copy, current._replace(active=current.active | (prompts.lengths > 0)))
        if chunk_size is not None and chunk_size < length:
            tokens, seq = pad_prompts(
                [row[valid] for row, valid in zip(prompts.tokens, prompts.valid, strict=True)],
                prefix_lengths=prompts.prefix_lengths.tolist(),
                length=-(-int(prompts.lengths.max()) // chunk_size) * chunk_size,
            )
            prompts, length = Prompts(tokens, seq), tokens.shape[1]
        arrays = prompts.tokens, prompts.valid, np.asarray(prompts.seq.prefix) & prompts.valid
        step = chunk_size or length
        for start in range(0, length, step):
            chunk = (x[:, start : start + step] for x in arrays)
            current = self._prefill_chunk_jit(self._weights, current, *chunk)
        if not bool(jnp.isfinite(current.logits).all()):
            row = int(jnp.argmin(jnp.isfinite(current.logits).all(axis=1)))
            raise NonFiniteLogitsError(f"the logits after prompt {row} are not finite; check the model's weights")
        return current

    def _empty_state(self, num_rows: int) -> DecodingState:
        model_state: State = self._init_state_jit(self._weights, num_rows)
        return DecodingState(
            model_state,
            jnp.zeros((num_rows, self.vocab_size)),
            jnp.zeros(num_rows, jnp.int32),
            jnp.zeros(num_rows, bool),
        )

    def _check_max_len(self, ends: Int[np.ndarray, " B"], phase: str) -> None:
        row = int(ends.argmax())
        if ends[row] > self.max_len:
            raise PromptError(
                f"row {row} would have {ends[row]} tokens after {phase}; max_len is {self.max_len}: increase it, or "
                f"request {ends[row] - self.max_len} fewer"
            )

    def _check_prefixes(self, prompts: Prompts, state: DecodingState | None, chunk_size: int | None) -> None:
        row = int(prompts.prefix_lengths.argmax())
        size = int(prompts.prefix_lengths[row])
        if state is not None and size and bool((np.asarray(state.position) > 0)[prompts.prefix_lengths > 0].any()):
            raise PromptError(f"prompt {row} has a prefix of {size} tokens; a continued document cannot have a prefix")
        try:
            self.document_limits.check_batch(prompts.seq)
        except DocumentLayoutError as error:
            raise PromptError(f"the prompts do not fit the model: {error}") from error
        if chunk_size is not None and size > chunk_size and self.has_prefix_layers:
            raise PromptError(
                f"the prefix of prompt {row} is {size} tokens, which must be read at once, and chunk_size is "
                f"{chunk_size}: increase it, or shorten the prefix"
            )


def _check_range(name: str, value: int, end: int) -> None:
    """Check a number that keys samples: jax wraps larger ones, so that two of them would give equal samples."""
    if not 0 <= value < end:
        raise PromptError(f"{name} is {value}; it must be from 0 to {end - 1}")


def _pad_rows(x: np.ndarray, num_rows: int) -> np.ndarray:
    """Append rows of zeros, which are padding, up to a number of rows."""
    return np.concatenate([x, np.zeros((num_rows - len(x), *x.shape[1:]), x.dtype)])
