"""The state of decoding, and the compiled functions that advance it: chunked prefill and the token loop."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from recallax.layers.base import State
from recallax.models.lm import LM
from recallax.models.sampling import Sampling, row_keys
from recallax.types import SeqInfo, StepInfo

NO_TOKEN = -1
"""Fills `GenerationOutput.tokens` after the end of a row that has stopped."""


class NonFiniteLogitsError(FloatingPointError):
    """Raised when logits are infinite or NaN, from which no token can be selected; the message names the row."""


class DecodingState(NamedTuple):
    """The state of a batch of documents after some tokens. It is a value: functions do not modify it."""

    model_state: State
    logits: Float[Array, "B V"]
    """Float32 logits of the next token."""
    position: Int[Array, " B"]
    """Tokens read so far."""
    active: Bool[Array, " B"]
    """False in rows that have stopped, and in empty rows."""


class GenerationOutput(NamedTuple):
    """Generated tokens, and the state after them."""

    tokens: Int[np.ndarray, "B N"]
    """`NO_TOKEN` after a stop token."""
    lengths: Int[np.ndarray, " B"]
    """Tokens of each row, including its stop token."""
    state: DecodingState
    """The state after all tokens except stop tokens: a stopped row keeps the state before its stop token."""

    def sequences(self) -> list[Int[np.ndarray, " _"]]:
        """Return each row's tokens without the filling after its end.

        Returns:
            One array of token ids per row.
        """
        return [row[:count] for row, count in zip(self.tokens, self.lengths, strict=True)]


def prefill_chunk(
    graphdef: nnx.GraphDef,
    weights: nnx.State,
    state: DecodingState,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    prefix: Bool[Array, "B T"],
) -> DecodingState:
    """Read further tokens of each row.

    Args:
        graphdef: The model's graph definition.
        weights: The model's variables.
        state: The state before the tokens.
        tokens: Token ids, padded on either side.
        valid: True at tokens, False at padding.
        prefix: True at tokens that may be read in both directions.

    Returns:
        The state after the tokens. Rows without tokens keep their logits.
    """
    index = jnp.arange(tokens.shape[1])[None]
    count, last = valid.sum(axis=1), jnp.max(jnp.where(valid, index, 0), axis=1)
    positions = state.position[:, None] + index - jnp.argmax(valid, axis=1)[:, None]
    positions = jnp.where(valid, positions, state.position[:, None])
    seq = SeqInfo(positions, valid.astype(jnp.int32), prefix)
    logits, model_state, _ = nnx.merge(graphdef, weights).prefill(tokens, seq, state.model_state, last[:, None])
    logits = jnp.where((count > 0)[:, None], logits[:, 0], state.logits)
    return DecodingState(model_state, logits, state.position + count, state.active)


def decode_loop(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    weights: nnx.State,
    state: DecodingState,
    key: PRNGKeyArray,
    row_ids: Int[Array, " B"],
    max_new_tokens: int,
) -> tuple[Int[Array, "B N"], DecodingState, Bool[Array, " B"]]:
    """Generate tokens until all rows have stopped.

    Args:
        graphdef: The model's graph definition.
        sampling: The rule that selects tokens.
        stop_token_ids: Tokens that end a row.
        weights: The model's variables.
        state: The state before the tokens.
        key: The key of all samples.
        row_ids: Ids of the rows, which key their samples together with the position.
        max_new_tokens: The largest number of tokens per row.

    Returns:
        Token ids, with `NO_TOKEN` after stop tokens, the state after them, and True for each row whose logits were all
        finite.
    """
    stop = jnp.array(stop_token_ids, jnp.int32)

    def condition(carry: tuple) -> Bool[Array, ""]:
        step, _, state, _ = carry
        return (step < max_new_tokens) & state.active.any()

    def body(carry: tuple) -> tuple:
        step, tokens, state, finite = carry
        sampled = sampling.sample(state.logits, row_keys(key, row_ids, state.position))
        tokens = tokens.at[:, step].set(jnp.where(state.active, sampled, NO_TOKEN))
        active = state.active & ~(sampled[:, None] == stop[None]).any(axis=1)
        # The model is merged inside the loop, because a step may change attributes of its modules.
        model = nnx.merge(graphdef, weights)
        logits, model_state = model.step(sampled, StepInfo(state.position, active), state.model_state)
        logits = jnp.where(active[:, None], logits, state.logits)
        new = DecodingState(model_state, logits, state.position + active.astype(jnp.int32), active)
        return step + 1, tokens, new, finite & jnp.isfinite(logits).all(axis=1)

    tokens = jnp.full((len(row_ids), max_new_tokens), NO_TOKEN, jnp.int32)
    first = (jnp.zeros((), jnp.int32), tokens, state, jnp.isfinite(state.logits).all(axis=1))
    _, tokens, state, finite = jax.lax.while_loop(condition, body, first)
    return tokens, state, finite


def find_batch_axes(model: LM, max_len: int) -> State:
    """Return the batch axis of every leaf of the model's state; in repeated layers other axes precede it.

    Args:
        model: The model.
        max_len: The largest number of tokens per row.

    Returns:
        A tree of the state's structure with axis numbers.
    """
    two, three = (jax.eval_shape(lambda n=n: model.init_state(n, max_len)) for n in (2, 3))
    return jax.tree.map(lambda a, b: [x != y for x, y in zip(a.shape, b.shape, strict=True)].index(True), two, three)
