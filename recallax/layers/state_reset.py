"""Resets of an incoming state at the start of a document."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from recallax.layers.base import State
from recallax.types import SeqInfo, StepInfo


def reset_for_prefill(state: State, seq: SeqInfo) -> State:
    """Reset the state of rows that start a document, before a prefill.

    Args:
        state: Arrays with a leading batch axis.
        seq: Positions and documents of the tokens to come.

    Returns:
        The state, with the rows whose first token has position 0 set to zero. Rows of padding keep their state.
    """
    return zero_rows(state, (jnp.asarray(seq.positions)[:, 0] == 0) & (jnp.asarray(seq.segment_ids)[:, 0] > 0))


def reset_for_step(state: State, info: StepInfo) -> State:
    """Reset the state of rows that start a document, before a one-token step.

    Args:
        state: Arrays with a leading batch axis.
        info: Position and activity of each row.

    Returns:
        The state with active rows at position 0 set to zero.
    """
    return zero_rows(state, jnp.asarray(info.active) & (jnp.asarray(info.position) == 0))


def zero_rows(state: State, rows: Bool[Array, " B"]) -> State:
    """Set rows of a state to zero.

    Args:
        state: Arrays with a leading batch axis.
        rows: Rows to set to zero.

    Returns:
        The changed state.
    """
    return jax.tree.map(lambda x: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), 0, x), state)


def where_rows[Tree](rows: Bool[Array, " B"], new: Tree, old: Tree) -> Tree:
    """Select rows of two states.

    Args:
        rows: Rows to take from `new`.
        new: Arrays with a leading batch axis.
        old: Arrays of the same structure and shapes.

    Returns:
        `new` in the given rows and `old` in the others.
    """
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)
