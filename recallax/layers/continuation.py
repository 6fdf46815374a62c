"""When an incoming state counts, and how a one-token step relates to it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from recallax.config import ConfigError
from recallax.layers.base import State
from recallax.types import SeqInfo, StepInfo


def continued(state: State, seq: SeqInfo) -> State:
    """The state that a prefill starts from: zero in rows whose first token has position 0, kept in empty rows."""
    return zero_rows(state, (jnp.asarray(seq.positions)[:, 0] == 0) & (jnp.asarray(seq.segments)[:, 0] > 0))


def started(state: State, info: StepInfo) -> State:
    """The state that a step starts from: zero in active rows at position 0."""
    return zero_rows(state, jnp.asarray(info.active) & (jnp.asarray(info.position) == 0))


def zero_rows(state: State, rows: Bool[Array, " B"]) -> State:
    """Every leaf [B, ...] with the given rows set to zero."""
    return jax.tree.map(lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), 0, x), state)


def divide_heads(what: str, width: int, heads: int) -> int:
    """Width of one head. Raises ConfigError unless `heads` divides `width`."""
    if heads < 1 or width % heads:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ConfigError(f"{what}: {width} channels cannot be split into {heads} heads; use one of {divisors}")
    return width // heads
