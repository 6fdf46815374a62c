"""Moving tokens to the memories that they chose and back, exactly: no capacity, no drops, static shapes.

Every token takes `num_slots` places, one per chosen memory, so B T slots places exist whatever the routing. `RoutingPlan`
orders them twice: over the whole batch by memory, for products with each memory's weights (`ragged_dot`), and within
each row by memory, document and time, for the recurrence. All moves are gathers, and so are their gradients (a
scatter-add would make gradients depend on the order of additions).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from recallax.layers.dense import Linear
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.einsum_f32 import ragged_dot_f32


class RoutingPlan(NamedTuple):
    """The two orders of the places. A place's number is t slots + slot in its row, (b T + t) slots + slot in all."""

    memory_order: Int[Array, " N"]
    """Place at each position of the order by memory."""
    group_sizes: Int[Array, " M"]
    """Places of each memory."""
    row_order: Int[Array, "B P"]
    """Place, within the row, at each position of the row's order."""
    inverse_row_order: Int[Array, "B P"]
    """Position in the row's order of each place."""
    segment_ids: Int[Array, "B P"]
    """In the row's order: one id per memory and document, 0 at padding."""
    memory_ids: Int[Array, "B P"]
    """In the row's order."""


def plan_routing(indices: Int[Array, "B T S"], segment_ids: Int[Array, "B T"], num_memories: int) -> RoutingPlan:
    """The orders of tokens that chose `indices`, each memory at most once per token; padding stands at the row's end."""
    batch, length = indices.shape[:2]
    docs = index_documents(segment_ids)
    last = num_memories * length
    key = jnp.where(docs.valid[..., None], indices * length + docs.index[..., None], last).reshape(batch, -1)
    row = jnp.argsort(key, axis=1, stable=True)  # time order within a memory and document rests on stability
    back = jnp.argsort(row, axis=1)
    ordered = jnp.take_along_axis(key, row, axis=1)
    memory = jnp.take_along_axis(indices.reshape(batch, -1), row, axis=1)
    flat = indices.reshape(-1)
    grouped = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_memories)[None], axis=0, dtype=jnp.int32)
    return RoutingPlan(grouped, sizes, row, back, jnp.where(ordered == last, 0, ordered + 1), memory)


def tokens_to_rows(x: Shaped[Array, "B T ..."], plan: RoutingPlan) -> Shaped[Array, "B P ..."]:
    """Each token at all its places, in the rows' order."""
    slots = plan.row_order.shape[1] // x.shape[1]
    return _gather_with_known_inverse(
        x, plan.row_order // slots, plan.inverse_row_order.reshape(x.shape[0], x.shape[1], slots)
    )


def permute(x: Float[Array, "B T D"], plan: RoutingPlan) -> Float[Array, "N D"]:
    """Each token at all its places, over the whole batch by memory."""
    tokens = x.shape[0] * x.shape[1]
    slots = plan.memory_order.shape[0] // tokens
    places = jnp.argsort(plan.memory_order).reshape(1, tokens, slots)
    return _gather_with_known_inverse(x.reshape(1, tokens, -1), (plan.memory_order // slots)[None], places)[0]


def unpermute(x: Float[Array, "N W"], plan: RoutingPlan) -> Float[Array, "B P W"]:
    """From the order by memory to the rows' order."""
    batch, places = plan.row_order.shape
    first = places * jnp.arange(batch)[:, None]
    index = jnp.argsort(plan.memory_order)[(first + plan.row_order).reshape(-1)]
    back = (first + plan.inverse_row_order).reshape(-1)[plan.memory_order]
    return _gather_with_known_inverse(x[None], index[None], back[None, :, None])[0].reshape(batch, places, -1)


def rows_to_slots(x: Shaped[Array, "B P ..."], plan: RoutingPlan, num_slots: int) -> Shaped[Array, "B T S ..."]:
    """From the rows' order to each token's slots."""
    batch, places = plan.row_order.shape
    y = _gather_with_known_inverse(x, plan.inverse_row_order, plan.row_order[..., None])
    return y.reshape(batch, places // num_slots, num_slots, *x.shape[2:])


def unpermute_to_slots(
    x: Float[Array, "N W"], plan: RoutingPlan, batch: int, num_slots: int
) -> Float[Array, "B T S W"]:
    """From the order by memory to each token's slots."""
    y = _gather_with_known_inverse(x[None], jnp.argsort(plan.memory_order)[None], plan.memory_order[None, :, None])
    return y.reshape(batch, -1, num_slots, x.shape[-1])


def grouped_linear(linear: Linear, x: Float[Array, "N D"], group_sizes: Int[Array, " M"]) -> Float[Array, "N W"]:
    """Every token times the weights of its memory; `linear` is stacked over memories, x is ordered by memory."""
    y = ragged_dot_f32(x.astype(linear.dtype), linear.kernel[...].astype(linear.dtype), group_sizes)
    if linear.bias is not None:
        ends = jnp.cumsum(group_sizes)
        index = jnp.arange(x.shape[0])[:, None]
        mine = (index < ends[None]) & (index >= (ends - group_sizes)[None])
        y += jnp.matmul(mine.astype(y.dtype), linear.bias[...].astype(y.dtype), precision=jax.lax.Precision.HIGHEST)
    return y.astype(linear.dtype)


@jax.custom_vjp
def _gather_with_known_inverse(
    x: Shaped[Array, "B I ..."], source: Int[Array, "B O"], places: Int[Array, "B I S"]
) -> Array:
    """out[b, o] = x[b, source[b, o]]; `places` lists where each entry went, so that the gradient is a gather too."""
    return _take(x, source)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _gather_fwd(x: Array, source: Array, places: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, source), (source, places)


def _gather_bwd(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    source, places = residuals
    batch, entries, slots = places.shape
    parts = _take(grad, places.reshape(batch, -1)).reshape(batch, entries, slots, *grad.shape[2:])
    total = jnp.sum(parts.astype(jnp.float32), axis=2).astype(grad.dtype)
    return total, np.zeros(source.shape, jax.dtypes.float0), np.zeros(places.shape, jax.dtypes.float0)


_gather_with_known_inverse.defvjp(_gather_fwd, _gather_bwd)
