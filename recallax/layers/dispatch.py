"""Moving tokens to the memories that they chose and back, exactly: no capacity, no drops, static shapes.

Every token takes `slots` places, one per chosen memory, so B T slots places exist whatever the routing. `Dispatch`
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
from recallax.pallas_kernels.chunking import documents
from recallax.pallas_kernels.product import grouped_product


class Dispatch(NamedTuple):
    """The two orders of the places. A place's number is t slots + slot in its row, (b T + t) slots + slot in all."""

    grouped: Int[Array, " N"]
    """Place at each position of the order by memory."""
    sizes: Int[Array, " M"]
    """Places of each memory."""
    row: Int[Array, "B P"]
    """Place, within the row, at each position of the row's order."""
    back: Int[Array, "B P"]
    """Position in the row's order of each place."""
    segments: Int[Array, "B P"]
    """In the row's order: one id per memory and document, 0 at padding."""
    memory: Int[Array, "B P"]
    """In the row's order."""


def dispatch(chosen: Int[Array, "B T S"], segments: Int[Array, "B T"], memories: int) -> Dispatch:
    """The orders of tokens that chose `chosen`, each memory at most once per token; padding stands at the row's end."""
    batch, length = chosen.shape[:2]
    docs = documents(segments)
    last = memories * length
    key = jnp.where(docs.valid[..., None], chosen * length + docs.index[..., None], last).reshape(batch, -1)
    row = jnp.argsort(key, axis=1, stable=True)  # time order within a memory and document rests on stability
    back = jnp.argsort(row, axis=1)
    ordered = jnp.take_along_axis(key, row, axis=1)
    memory = jnp.take_along_axis(chosen.reshape(batch, -1), row, axis=1)
    flat = chosen.reshape(-1)
    grouped = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(memories)[None], axis=0, dtype=jnp.int32)
    return Dispatch(grouped, sizes, row, back, jnp.where(ordered == last, 0, ordered + 1), memory)


def spread(x: Shaped[Array, "B T ..."], plan: Dispatch) -> Shaped[Array, "B P ..."]:
    """Each token at all its places, in the rows' order."""
    slots = plan.row.shape[1] // x.shape[1]
    return _gather(x, plan.row // slots, plan.back.reshape(x.shape[0], x.shape[1], slots))


def by_memory(x: Float[Array, "B T D"], plan: Dispatch) -> Float[Array, "N D"]:
    """Each token at all its places, over the whole batch by memory."""
    tokens = x.shape[0] * x.shape[1]
    slots = plan.grouped.shape[0] // tokens
    places = jnp.argsort(plan.grouped).reshape(1, tokens, slots)
    return _gather(x.reshape(1, tokens, -1), (plan.grouped // slots)[None], places)[0]


def to_rows(x: Float[Array, "N W"], plan: Dispatch) -> Float[Array, "B P W"]:
    """From the order by memory to the rows' order."""
    batch, places = plan.row.shape
    first = places * jnp.arange(batch)[:, None]
    index = jnp.argsort(plan.grouped)[(first + plan.row).reshape(-1)]
    back = (first + plan.back).reshape(-1)[plan.grouped]
    return _gather(x[None], index[None], back[None, :, None])[0].reshape(batch, places, -1)


def gathered(x: Shaped[Array, "B P ..."], plan: Dispatch, slots: int) -> Shaped[Array, "B T S ..."]:
    """From the rows' order to each token's slots."""
    batch, places = plan.row.shape
    y = _gather(x, plan.back, plan.row[..., None])
    return y.reshape(batch, places // slots, slots, *x.shape[2:])


def to_slots(x: Float[Array, "N W"], plan: Dispatch, batch: int, slots: int) -> Float[Array, "B T S W"]:
    """From the order by memory to each token's slots."""
    y = _gather(x[None], jnp.argsort(plan.grouped)[None], plan.grouped[None, :, None])
    return y.reshape(batch, -1, slots, x.shape[-1])


def project(linear: Linear, x: Float[Array, "N D"], sizes: Int[Array, " M"]) -> Float[Array, "N W"]:
    """Every token times the weights of its memory; `linear` is stacked over memories, x is ordered by memory."""
    y = grouped_product(x.astype(linear.dtype), linear.kernel[...].astype(linear.dtype), sizes)
    if linear.bias is not None:
        ends = jnp.cumsum(sizes)
        index = jnp.arange(x.shape[0])[:, None]
        mine = (index < ends[None]) & (index >= (ends - sizes)[None])
        y += jnp.matmul(mine.astype(y.dtype), linear.bias[...].astype(y.dtype), precision=jax.lax.Precision.HIGHEST)
    return y.astype(linear.dtype)


@jax.custom_vjp
def _gather(x: Shaped[Array, "B I ..."], source: Int[Array, "B O"], places: Int[Array, "B I S"]) -> Array:
    """out[b, o] = x[b, source[b, o]]; `places` lists where each entry went, so that the gradient is a gather too."""
    return _take(x, source)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _gather_forward(x: Array, source: Array, places: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, source), (source, places)


def _gather_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    source, places = kept
    batch, entries, slots = places.shape
    parts = _take(slope, places.reshape(batch, -1)).reshape(batch, entries, slots, *slope.shape[2:])
    total = jnp.sum(parts.astype(jnp.float32), axis=2).astype(slope.dtype)
    return total, np.zeros(source.shape, jax.dtypes.float0), np.zeros(places.shape, jax.dtypes.float0)


_gather.defvjp(_gather_forward, _gather_backward)
