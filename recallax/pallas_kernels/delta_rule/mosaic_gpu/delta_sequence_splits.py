"""Splits of rows in time for the delta rule, so that a few rows and heads occupy a GPU.

A split maps the state S to M S + B. One loop over all splits at once, from empty states, gives B; another, which writes
nothing and starts from the identity, gives M. A scan over the splits gives the states between them, and a third loop
computes the outputs. Backward in time the gradient of the state passes through M^T.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu.sequence_splits import (
    choose_num_splits,
    merge_rows,
    merge_rows_head_major,
    propagate_split_states,
)

NUM_PASSES = 3
"""Loops over each split, in place of one over the row: as many splits, or fewer, would gain nothing."""

_apply_transition = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def choose_num_delta_splits(num_blocks: int, num_chunks: int) -> int:
    """Return the number of splits of each row.

    Args:
        num_blocks: Blocks without splits: one per row and head.
        num_chunks: Chunks of a row.
    """
    num_splits = choose_num_splits(num_blocks, num_chunks)
    return num_splits if num_splits > NUM_PASSES else 1


def forward_split_states(
    final_state_fn: Callable[[Array, Array, Array], Float[Array, "N H K _"]],
    v: Float[Array, "N S H V"],
    write: Float[Array, "N H S"],
    keys: Float[Array, "N S H K"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "N H K V"], Float[Array, "N H K K"] | None]:
    """Compute the state before each of N splits, and the splits' transitions.

    Args:
        final_state_fn: `final_state_fn(values, write strengths, initial states) -> final states` of all splits.
        v: Values.
        write: Write strengths.
        keys: Finite values of this shape, which stand in for values where nothing is written.
        state: State before each row.

    Returns:
        The states, and M of each split; M is None where a row is one split.
    """
    if len(v) == len(state):
        return state, None
    shape = (len(v), *state.shape[1:3])
    increments = final_state_fn(v, write, jnp.zeros((*shape, state.shape[3]), state.dtype))
    identity = jnp.broadcast_to(jnp.eye(shape[2], dtype=state.dtype), (*shape, shape[2]))
    transitions = final_state_fn(keys, jnp.zeros_like(write), identity)
    states = propagate_split_states(increments, transitions, state, reverse=False, apply_transition=_apply_transition)
    return states, transitions


def backward_split_grads(
    initial_grad_fn: Callable[[Array], Float[Array, "N H K V"]],
    transitions: Float[Array, "N H K K"] | None,
    state_grad: Float[Array, "B H K V"],
) -> Float[Array, "N H K V"]:
    """Compute the gradient of the state after each split.

    Args:
        initial_grad_fn: Maps gradients of the states after the splits to those before them.
        transitions: M of each split; None where a row is one split.
        state_grad: Gradient of the state after each row.
    """
    if transitions is None:
        return state_grad
    increments = initial_grad_fn(jnp.zeros((len(transitions), *state_grad.shape[1:]), state_grad.dtype))
    return propagate_split_states(
        increments, jnp.swapaxes(transitions, 2, 3), state_grad, reverse=True, apply_transition=_apply_transition
    )


def merge_residuals(
    residuals: tuple[Float[Array, "N S H V"], Float[Array, "N H C K V"]] | tuple[()], num_splits: int
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H M K V"]] | tuple[()]:
    """Merge the splits of the arrays that a loop stores per token and per chunk."""
    if not residuals:
        return ()
    return merge_rows(residuals[0], num_splits), merge_rows_head_major(residuals[1], num_splits)
