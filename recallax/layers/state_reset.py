"""When an incoming state counts, and how a one-token step relates to it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from recallax.config import ConfigError
from recallax.layers.base import State
from recallax.types import SeqInfo, StepInfo


def reset_for_prefill(state: State, seq: SeqInfo) -> State:
    """The state that a prefill starts from: zero in rows whose first token has position 0, kept in empty rows."""
    return zero_rows(state, (jnp.asarray(seq.positions)[:, 0] == 0) & (jnp.asarray(seq.segment_ids)[:, 0] > 0))


def reset_for_step(state: State, info: StepInfo) -> State:
    """The state that a step starts from: zero in active rows at position 0."""
    return zero_rows(state, jnp.asarray(info.active) & (jnp.asarray(info.position) == 0))


def zero_rows(state: State, rows: Bool[Array, " B"]) -> State:
    """Every leaf [B, ...] with the given rows set to zero."""
    return jax.tree.map(lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), 0, x), state)


def head_dim_of(name: str, width: int, num_heads: int) -> int:
    """Width of one head. Raises ConfigError unless `num_heads` divides `width`."""
    if num_heads < 1 or width % num_heads:
        divisors = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0)
        raise ConfigError(f"{name}: {width} channels cannot be split into {num_heads} heads; use one of {divisors}")
    return width // num_heads
