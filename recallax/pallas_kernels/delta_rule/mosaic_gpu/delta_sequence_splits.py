"""Rows of the delta rule cut into segments, so that few rows and heads keep a GPU busy.

A segment takes the state S to M S + B. One walk over all segments at once, from empty states, gives B; another, which
writes nothing and starts from the identity, gives M; the states between the segments follow from one another, and a
third walk is the one that counts. Backward in time the gradient of the state goes through M^T.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recallax.pallas_kernels.mosaic_gpu import sequence_splits as linear

NUM_PASSES = 3
"""In place of one, so fewer segments than one more would gain nothing."""

_apply_transition = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def choose_num_delta_splits(num_blocks: int, num_chunks: int) -> int:
    """Into how many segments rows of so many chunks are cut, where there is a block per row and head."""
    segments = linear.choose_num_splits(num_blocks, num_chunks)
    return segments if segments > NUM_PASSES else 1


def forward_split_states(
    final_state_fn: Callable[[Array, Array, Array], Float[Array, "N H K _"]],
    v: Float[Array, "N S H V"],
    write: Float[Array, "N H S"],
    keys: Float[Array, "N S H K"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "N H K V"], Float[Array, "N H K K"] | None]:
    """The state before each of N segments and what each does to a state; None where a row is one segment.

    final_of: (values, strengths of writing, states before) -> states behind. keys: anything finite of that shape.
    """
    if len(v) == len(state):
        return state, None
    shape = (len(v), *state.shape[1:3])
    added = final_state_fn(v, write, jnp.zeros((*shape, state.shape[3]), state.dtype))
    identity = jnp.broadcast_to(jnp.eye(shape[2], dtype=state.dtype), (*shape, shape[2]))
    through = final_state_fn(keys, jnp.zeros_like(write), identity)
    return linear.propagate_split_states(
        added, through, state, reverse=False, apply_transition=_apply_transition
    ), through


def backward_split_grads(
    initial_grad_fn: Callable[[Array], Float[Array, "N H K V"]],
    transitions: Float[Array, "N H K K"] | None,
    state: Float[Array, "B H K V"],
) -> Float[Array, "N H K V"]:
    """The gradient of the state behind each segment. first_of: gradients behind -> gradients before."""
    if transitions is None:
        return state
    added = initial_grad_fn(jnp.zeros((len(transitions), *state.shape[1:]), state.dtype))
    return linear.propagate_split_states(
        added, jnp.swapaxes(transitions, 2, 3), state, reverse=True, apply_transition=_apply_transition
    )


def merge_residuals(
    residuals: tuple[Float[Array, "N S H V"], Float[Array, "N H C K V"]] | tuple[()], num_splits: int
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H M K V"]] | tuple[()]:
    """What a walk keeps per token and per chunk, of whole rows again."""
    return (
        (linear.merge_rows(residuals[0], num_splits), linear.merge_rows_head_major(residuals[1], num_splits))
        if residuals
        else ()
    )
