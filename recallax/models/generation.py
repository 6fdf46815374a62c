"""Generation: prompts are read once, then tokens follow one another in one compiled loop.

    read prompts -> Standing (state, logits, position per row) -> generate -> tokens, and a Standing to go on from

A `Standing` is a value: it can be generated from many times, forked into more rows, and read on from. What holds, for
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
from recallax.layers.prefix import PrefixMixer
from recallax.models.lm import LM
from recallax.models.prompts import PromptError, Prompts, TokenIds, checked, padded
from recallax.models.readout import AutoencodeModule
from recallax.models.sampling import Greedy, Sampling, row_keys
from recallax.types import SeqInfo, StepInfo

NOTHING = -1
"""Stands in `Generated.tokens` behind the end of a row that has stopped."""


class Standing(NamedTuple):
    """Where the documents of a batch stand."""

    state: State
    logits: Float[Array, "B V"]
    """Of the token that comes next, float32."""
    position: Int[Array, " B"]
    """Tokens read so far."""
    active: Bool[Array, " B"]
    """False in rows that have stopped, and in rows that hold nothing."""


class Generated(NamedTuple):
    """Tokens chosen, and where they leave the documents."""

    tokens: Int[np.ndarray, "B N"]
    """`NOTHING` behind a stop token."""
    counts: Int[np.ndarray, " B"]
    """Tokens of each row, its stop token among them."""
    after: Standing
    """All of them read but stop tokens: a stopped row is as it was when it stopped."""

    def rows(self) -> list[Int[np.ndarray, " _"]]:
        """Each row's tokens without what follows its end."""
        return [row[:count] for row, count in zip(self.tokens, self.counts, strict=True)]


class Generator:
    """A model that writes. Programs are compiled once for each batch and length, and kept."""

    def __init__(self, model: LM, *, max_len: int, sampling: Sampling | None = None, stop: Sequence[int] = ()):
        """max_len: tokens that a row may have, read and written, which bounds the states that grow. sampling: None is
        greedy. stop: ids that end a row. Raises ConfigError where these do not fit or the model cannot decode."""
        self.vocab = model.embedding.shape[0]
        if isinstance(model.readout, AutoencodeModule):
            raise ConfigError("the readout Autoencode reads the end of a row by design; a model with it cannot decode")
        if max_len < 2:
            raise ConfigError(f"max_len is {max_len}; it must be at least 2 tokens, one to read and one to write")
        for token in stop:
            if not 0 <= token < self.vocab:
                raise ConfigError(f"stop has the token {token}; ids of this model are 0 to {self.vocab - 1}")
        self.max_len, self.sampling, self.stop = max_len, sampling or Greedy(), tuple(stop)
        readers = [module for _, module in nnx.iter_modules(model) if isinstance(module, PrefixMixer)]
        self.reads_prefixes = bool(readers)
        self.max_prefix = min((r.max_prefix for r in readers if r.max_prefix is not None), default=max_len)
        self._graph, self._weights = nnx.split(model)
        self._begin = jax.jit(self._init_state, static_argnums=1)
        self._axes = _row_axes(model, max_len)
        self._read = jax.jit(self._read_piece, donate_argnums=1)
        self._generate = jax.jit(self._loop, static_argnums=4)

    def prefill(self, prompts: Prompts, after: Standing | None = None, piece: int | None = None) -> Standing:
        """Read one prompt per row, behind what `after` has read, which stays as it is.

        piece: read that many tokens at a time, so that the device holds a piece and a state and never the prompts;
        None reads them at once. Where a layer reads prefixes in both directions, one must fit the first piece. Rows
        that had stopped go on. Raises PromptError.
        """
        checked(prompts, self.vocab)
        if after is not None and len(after.position) != len(prompts.tokens):
            raise PromptError(
                f"there are {len(prompts.tokens)} prompts, and {len(after.position)} rows to go on from; `fork` these"
            )
        if piece is not None and piece < 1:
            raise PromptError(f"piece is {piece}; it must be at least 1 token")
        self._check_prefixes(prompts, after, piece)
        return self._prefill(prompts, after, piece)

    def generate(self, after: Standing, new: int, *, seed: int = 0, rows: Sequence[int] | None = None) -> Generated:
        """Up to `new` further tokens of each active row; the loop ends when all rows have stopped.

        seed, rows: what draws are keyed by; `rows` are numbers that name the rows (None: 0, 1, ...), so that a row
        keeps its draws in another batch. Raises PromptError where there is no room for them.
        """
        if new < 1:
            raise PromptError(f"new is {new}; it must be at least 1 token")
        self._check_room(np.where(after.active, after.position, 0) + new, "generated")
        names = np.arange(len(after.position)) if rows is None else np.asarray(rows)
        if names.shape != after.position.shape:
            raise PromptError(f"rows names {names.size} rows; there are {len(after.position)}")
        key = jax.random.key(seed)
        tokens, after = self._generate(self._weights, after, key, jnp.asarray(names, jnp.int32), new)
        tokens = np.asarray(tokens)
        return Generated(tokens, (tokens != NOTHING).sum(axis=1), after)

    def fork(self, standing: Standing, rows: Sequence[int] | Int[np.ndarray, " N"]) -> Standing:
        """Those rows, each as often as it is named: a context that was read once serves many questions."""
        index, count = np.asarray(rows, np.int32), len(standing.position)
        if index.ndim != 1 or not index.size or index.min() < 0 or index.max() >= count:
            raise PromptError(f"rows to fork are {index.tolist()}; they must be row numbers from 0 to {count - 1}")
        state = jax.tree.map(lambda x, axis: jnp.take(x, index, axis=axis), standing.state, self._axes)
        return Standing(state, standing.logits[index], standing.position[index], standing.active[index])

    def answer(
        self,
        context: Standing,
        questions: Sequence[TokenIds],
        new: int,
        *,
        batch: int = 8,
        width: int | None = None,
        seed: int = 0,
        names: Sequence[int] | None = None,
    ) -> list[Int[np.ndarray, " _"]]:
        """What follows each question if it is asked behind the context, a single row, which stays as it is.

        batch: questions at a time; the last ones are filled up with empty rows. width: tokens that a question may have
        (None: as the longest here); answers are bit-equal over calls of one batch, width and `new`. names: numbers that
        the draws of each question are keyed by (None: 0, 1, ...). Raises PromptError.
        """
        if len(context.position) != 1:
            raise PromptError(f"the context has {len(context.position)} rows; `fork` the one that is asked")
        if batch < 1:
            raise PromptError(f"batch is {batch}; it must be at least 1 question")
        asked = checked(padded(questions, length=width), self.vocab)
        names = list(range(len(questions))) if names is None else list(names)
        if len(names) != len(questions):
            raise PromptError(f"names has {len(names)} numbers for {len(questions)} questions; give one each")
        copies = self.fork(context, [0] * batch)
        answers: list[Int[np.ndarray, " _"]] = []
        for begin in range(0, len(questions), batch):
            part = jax.tree.map(lambda x, begin=begin: _filled(x[begin : begin + batch], batch), asked)
            here = self._prefill(part, copies._replace(active=jnp.zeros(batch, bool)), None)
            rows = (names[begin : begin + batch] + [0] * batch)[:batch]
            answers += self.generate(here, new, seed=seed, rows=rows).rows()
        return answers[: len(questions)]

    def _prefill(self, prompts: Prompts, after: Standing | None, piece: int | None) -> Standing:
        """The same, where rows may be empty: these stay as they are."""
        rows, length = prompts.tokens.shape
        before = np.zeros(rows, np.int64) if after is None else np.asarray(after.position)
        self._check_room(before + prompts.lengths, "read")
        if after is None:
            here = Standing(
                self._begin(self._weights, rows),
                jnp.zeros((rows, self.vocab)),
                jnp.zeros(rows, jnp.int32),
                jnp.zeros(rows, bool),
            )
        else:
            here = after
        here = jax.tree.map(jnp.copy, here._replace(active=here.active | (prompts.lengths > 0)))  # `_read` uses it up
        if piece is not None and piece < length:
            tokens, seq = padded(
                [row[valid] for row, valid in zip(prompts.tokens, prompts.valid, strict=True)],
                prefix=prompts.prefixes.tolist(),
                length=-(-int(prompts.lengths.max()) // piece) * piece,
            )
            prompts, length = Prompts(tokens, seq), tokens.shape[1]
        for begin in range(0, length, piece or length):
            here = self._read(
                self._weights, here, *(part[:, begin : begin + (piece or length)] for part in _parts(prompts))
            )
        if not bool(jnp.isfinite(here.logits).all()):
            row = int(jnp.argmin(jnp.isfinite(here.logits).all(axis=1)))
            raise FloatingPointError(f"the logits behind prompt {row} are not finite; look at the model's weights")
        return here

    def _init_state(self, weights: nnx.State, rows: int) -> State:
        return nnx.merge(self._graph, weights).init_state(rows, self.max_len)

    def _read_piece(
        self,
        weights: nnx.State,
        here: Standing,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        prefix: Bool[Array, "B T"],
    ) -> Standing:
        place = jnp.arange(tokens.shape[1])[None]
        count, last = valid.sum(axis=1), jnp.max(jnp.where(valid, place, 0), axis=1)
        positions = here.position[:, None] + place - jnp.argmax(valid, axis=1)[:, None]
        positions = jnp.where(valid, positions, here.position[:, None])
        seq = SeqInfo(positions, valid.astype(jnp.int32), prefix)
        model = nnx.merge(self._graph, weights)
        logits, state, _ = model.prefill(tokens, seq, here.state, last[:, None])
        logits = jnp.where((count > 0)[:, None], logits[:, 0], here.logits)
        return Standing(state, logits, here.position + count, here.active)

    def _loop(
        self, weights: nnx.State, here: Standing, key: PRNGKeyArray, rows: Int[Array, " B"], new: int
    ) -> tuple[Int[Array, "B N"], Standing]:
        stop = jnp.array(self.stop, jnp.int32)

        def going(carry: tuple) -> Bool[Array, ""]:
            step, _, here = carry
            return (step < new) & here.active.any()

        def body(carry: tuple) -> tuple:
            step, tokens, here = carry
            drawn = self.sampling.choose(here.logits, row_keys(key, rows, here.position))
            tokens = tokens.at[:, step].set(jnp.where(here.active, drawn, NOTHING))
            active = here.active & ~(drawn[:, None] == stop[None]).any(axis=1)
            # Merged here: what a model changes of itself in a step belongs to the step.
            logits, state = nnx.merge(self._graph, weights).step(drawn, StepInfo(here.position, active), here.state)
            logits = jnp.where(active[:, None], logits, here.logits)
            return step + 1, tokens, Standing(state, logits, here.position + active.astype(jnp.int32), active)

        tokens = jnp.full((len(rows), new), NOTHING, jnp.int32)
        _, tokens, here = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), tokens, here))
        return tokens, here

    def _check_room(self, ends: Int[np.ndarray, " B"], what: str) -> None:
        row = int(ends.argmax())
        if ends[row] > self.max_len:
            raise PromptError(
                f"row {row} would have {ends[row]} tokens when all are {what}; max_len is {self.max_len}: raise it, or "
                f"ask for {ends[row] - self.max_len} fewer"
            )

    def _check_prefixes(self, prompts: Prompts, after: Standing | None, piece: int | None) -> None:
        row = int(prompts.prefixes.argmax())
        size = int(prompts.prefixes[row])
        if after is not None and size and bool((np.asarray(after.position) > 0)[prompts.prefixes > 0].any()):
            raise PromptError(f"prompt {row} has a prefix of {size} tokens; a document that goes on can have none")
        if size > self.max_prefix:
            raise PromptError(
                f"the prefix of prompt {row} is {size} tokens; this model reads at most {self.max_prefix} as a prefix"
            )
        if piece is not None and size > piece and self.reads_prefixes:
            raise PromptError(
                f"the prefix of prompt {row} is {size} tokens, which must be read at once, and piece is {piece}: make "
                f"it as long, or the prefix shorter"
            )


def _parts(prompts: Prompts) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    return prompts.tokens, prompts.valid, np.asarray(prompts.seq.prefix) & prompts.valid


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """With rows of zeros behind, up to that many: they are padding."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def _row_axes(model: LM, max_len: int) -> State:
    """Which axis of each leaf of a state counts rows; in repeated layers others stand before it."""
    two, three = (jax.eval_shape(lambda n=n: model.init_state(n, max_len)) for n in (2, 3))
    return jax.tree.map(lambda a, b: [x != y for x, y in zip(a.shape, b.shape, strict=True)].index(True), two, three)
