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

from recallax.pallas_kernels.linear_attention import segments as linear

WALKS = 3
"""In place of one, so fewer segments than one more would gain nothing."""

_through = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def number_of_segments(blocks: int, chunks: int) -> int:
    """Into how many segments rows of so many chunks are cut, where there is a block per row and head."""
    segments = linear.number_of_segments(blocks, chunks)
    return segments if segments > WALKS else 1


def forward_starts(
    final_of: Callable[[Array, Array, Array], Float[Array, "N H K _"]],
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
    added = final_of(v, write, jnp.zeros((*shape, state.shape[3]), state.dtype))
    identity = jnp.broadcast_to(jnp.eye(shape[2], dtype=state.dtype), (*shape, shape[2]))
    through = final_of(keys, jnp.zeros_like(write), identity)
    return linear.starts(added, through, state, reverse=False, through=_through), through


def backward_starts(
    first_of: Callable[[Array], Float[Array, "N H K V"]],
    through: Float[Array, "N H K K"] | None,
    state: Float[Array, "B H K V"],
) -> Float[Array, "N H K V"]:
    """The gradient of the state behind each segment. first_of: gradients behind -> gradients before."""
    if through is None:
        return state
    added = first_of(jnp.zeros((len(through), *state.shape[1:]), state.dtype))
    return linear.starts(added, jnp.swapaxes(through, 2, 3), state, reverse=True, through=_through)


def joined(
    kept: tuple[Float[Array, "N S H V"], Float[Array, "N H C K V"]] | tuple[()], segments: int
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H M K V"]] | tuple[()]:
    """What a walk keeps per token and per chunk, of whole rows again."""
    return (linear.join(kept[0], segments), linear.join_last(kept[1], segments)) if kept else ()
