"""Routing of tokens to experts or memories and back: exact, without a capacity or dropped tokens, with static shapes.

A token occupies `num_slots` entries, one per selected memory, so a batch has B T num_slots entries for any routing.
`RoutingPlan` has two orders of them: over the whole batch by memory, for products with each memory's weights
(`ragged_dot`), and within each row by memory, document and time, for the recurrence. All moves are gathers, and so are
their gradients; with a scatter-add, gradients would depend on the order of additions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from recallax.layers.dense import Linear
from recallax.pallas_kernels.chunking import index_documents
from recallax.pallas_kernels.einsum_f32 import ragged_dot_f32
from recallax.pallas_kernels.grid import gather_tokens


class RoutingPlan(NamedTuple):
    """The entries in two orders. Slot s of token t in row b is entry t S + s of the row and (b T + t) S + s of all."""

    memory_order: Int[Array, " N"]
    """Entry of the batch at each position of the order by memory."""
    group_sizes: Int[Array, " M"]
    """Number of entries of each memory."""
    row_order: Int[Array, "B P"]
    """Entry of the row at each position of the row's order."""
    inverse_row_order: Int[Array, "B P"]
    """Position in the row's order of each entry of the row."""
    segment_ids: Int[Array, "B P"]
    """One id per memory and document at each position of the row's order; 0 is padding."""
    memory_ids: Int[Array, "B P"]
    """Memory at each position of the row's order."""


def plan_routing(indices: Int[Array, "B T S"], segment_ids: Int[Array, "B T"], num_memories: int) -> RoutingPlan:
    """Sort the entries of a batch by memory.

    Args:
        indices: Selected memories of each token, each at most once.
        segment_ids: Document ids; 0 is padding, which is placed at the end of each row's order.
        num_memories: Number of memories.

    Returns:
        Both orders.
    """
    batch, length = indices.shape[:2]
    docs = index_documents(segment_ids)
    last = num_memories * length
    key = jnp.where(docs.valid[..., None], indices * length + docs.index[..., None], last).reshape(batch, -1)
    row_order = jnp.argsort(key, axis=1, stable=True)  # a stable sort keeps the order of time within a document
    inverse_row_order = jnp.argsort(row_order, axis=1)
    sorted_key = jnp.take_along_axis(key, row_order, axis=1)
    memory_ids = jnp.take_along_axis(indices.reshape(batch, -1), row_order, axis=1)
    flat = indices.reshape(-1)
    memory_order = jnp.argsort(flat, stable=True)
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_memories)[None], axis=0, dtype=jnp.int32)
    row_segments = jnp.where(sorted_key == last, 0, sorted_key + 1)
    return RoutingPlan(memory_order, group_sizes, row_order, inverse_row_order, row_segments, memory_ids)


def tokens_to_rows(x: Shaped[Array, "B T ..."], plan: RoutingPlan) -> Shaped[Array, "B P ..."]:
    """Copy each token to all of its entries, in the order of the rows.

    Args:
        x: One value per token.
        plan: Routing of the batch.

    Returns:
        One value per entry.
    """
    slots = plan.row_order.shape[1] // x.shape[1]
    return _gather_with_known_inverse(
        x, plan.row_order // slots, plan.inverse_row_order.reshape(x.shape[0], x.shape[1], slots)
    )


def permute(x: Float[Array, "B T D"], plan: RoutingPlan) -> Float[Array, "N D"]:
    """Copy each token to all of its entries, in the order by memory.

    Args:
        x: One vector per token.
        plan: Routing of the batch.

    Returns:
        One vector per entry of the batch.
    """
    tokens = x.shape[0] * x.shape[1]
    slots = plan.memory_order.shape[0] // tokens
    targets = jnp.argsort(plan.memory_order).reshape(1, tokens, slots)
    return _gather_with_known_inverse(x.reshape(1, tokens, -1), (plan.memory_order // slots)[None], targets)[0]


def unpermute(x: Float[Array, "N W"], plan: RoutingPlan) -> Float[Array, "B P W"]:
    """Move entries from the order by memory to the order of the rows.

    Args:
        x: One vector per entry of the batch.
        plan: Routing of the batch.

    Returns:
        One vector per entry of each row.
    """
    batch, entries = plan.row_order.shape
    first = entries * jnp.arange(batch)[:, None]
    source = jnp.argsort(plan.memory_order)[(first + plan.row_order).reshape(-1)]
    target = (first + plan.inverse_row_order).reshape(-1)[plan.memory_order]
    return _gather_with_known_inverse(x[None], source[None], target[None, :, None])[0].reshape(batch, entries, -1)


def rows_to_slots(x: Shaped[Array, "B P ..."], plan: RoutingPlan, num_slots: int) -> Shaped[Array, "B T S ..."]:
    """Move entries from the order of the rows to their tokens.

    Args:
        x: One value per entry of each row.
        plan: Routing of the batch.
        num_slots: Entries per token.

    Returns:
        The entries of each token.
    """
    batch, entries = plan.row_order.shape
    y = _gather_with_known_inverse(x, plan.inverse_row_order, plan.row_order[..., None])
    return y.reshape(batch, entries // num_slots, num_slots, *x.shape[2:])


def unpermute_to_slots(
    x: Float[Array, "N W"], plan: RoutingPlan, batch: int, num_slots: int
) -> Float[Array, "B T S W"]:
    """Move entries from the order by memory to their tokens.

    Args:
        x: One vector per entry of the batch.
        plan: Routing of the batch.
        batch: Number of rows.
        num_slots: Entries per token.

    Returns:
        The entries of each token.
    """
    y = _gather_with_known_inverse(x[None], jnp.argsort(plan.memory_order)[None], plan.memory_order[None, :, None])
    return y.reshape(batch, -1, num_slots, x.shape[-1])


def grouped_linear(linear: Linear, x: Float[Array, "N D"], group_sizes: Int[Array, " M"]) -> Float[Array, "N W"]:
    """Multiply each entry by the weights of its memory.

    Args:
        linear: A projection whose parameters have a leading axis of memories.
        x: Entries in the order by memory.
        group_sizes: Number of entries of each memory.

    Returns:
        Projected entries in the compute dtype.
    """
    y = ragged_dot_f32(x.astype(linear.dtype), linear.kernel[...].astype(linear.dtype), group_sizes)
    if linear.bias is not None:
        ends = jnp.cumsum(group_sizes)
        index = jnp.arange(x.shape[0])[:, None]
        in_group = (index < ends[None]) & (index >= (ends - group_sizes)[None])
        bias = linear.bias[...].astype(y.dtype)
        y += jnp.matmul(in_group.astype(y.dtype), bias, precision=jax.lax.Precision.HIGHEST)
    return y.astype(linear.dtype)


class MemoryRows(NamedTuple):
    """Entries of each memory in rows of their own, [B M, T]: a memory has at most one entry per token."""

    index: Int[Array, "B M T"]
    """Position in the row's order of each entry; 0 beyond the memory's last one."""
    mask: Bool[Array, "B M T"]
    """False beyond the memory's last entry."""
    count: Int[Array, "B M"]
    """Number of entries of each memory, without padding."""
    inverse_index: Int[Array, "B P"]
    """Index of each entry among the row's M T places; 0 for padding."""

    def split(self, x: Shaped[Array, "B P ..."]) -> Shaped[Array, "R T ..."]:
        """Move entries from the order of the rows to rows of their memory.

        Args:
            x: One value per entry of each row.

        Returns:
            Rows of T entries for each of the R = B M memories.
        """
        gathered = gather_tokens(x, self.index.reshape(x.shape[0], -1))
        return gathered.reshape(-1, self.index.shape[2], *x.shape[2:])

    def merge(self, x: Shaped[Array, "R T ..."]) -> Shaped[Array, "B P ..."]:
        """Undo `split`; entries of padding are arbitrary.

        Args:
            x: Rows of T entries for each of the R = B M memories.

        Returns:
            One value per entry of each row.
        """
        batch, memories, length = self.index.shape
        return gather_tokens(x.reshape(batch, memories * length, *x.shape[2:]), self.inverse_index)


def memory_rows(plan: RoutingPlan, num_memories: int, length: int) -> MemoryRows:
    """Assign the entries of each memory to rows of their own.

    Args:
        plan: Routing of the batch.
        num_memories: Number of memories.
        length: Tokens per row of the batch.

    Returns:
        The entries of each memory, in the order of the rows.
    """
    valid = plan.segment_ids > 0
    of_memory = (plan.memory_ids[:, None] == jnp.arange(num_memories)[None, :, None]) & valid[:, None]
    count = jnp.sum(of_memory, axis=-1)
    first = jnp.cumsum(count, axis=1) - count
    rank = jnp.arange(length)[None, None]
    mask = rank < count[..., None]
    place = plan.memory_ids * length + jnp.arange(plan.memory_ids.shape[1])[None]
    place -= jnp.take_along_axis(first, plan.memory_ids, axis=1)
    return MemoryRows(jnp.where(mask, first[..., None] + rank, 0), mask, count, jnp.where(valid, place, 0))


@jax.custom_vjp
def _gather_with_known_inverse(
    x: Shaped[Array, "B I ..."], source: Int[Array, "B O"], targets: Int[Array, "B I S"]
) -> Array:
    """out[b, o] = x[b, source[b, o]]; `targets` lists where each entry goes, so that the gradient is a gather too."""
    return gather_tokens(x, source)


def _gather_fwd(x: Array, source: Array, targets: Array) -> tuple[Array, tuple[Array, Array]]:
    return gather_tokens(x, source), (source, targets)


def _gather_bwd(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    source, targets = residuals
    batch, entries, slots = targets.shape
    parts = gather_tokens(grad, targets.reshape(batch, -1)).reshape(batch, entries, slots, *grad.shape[2:])
    total = jnp.sum(parts.astype(jnp.float32), axis=2).astype(grad.dtype)
    return total, np.zeros(source.shape, jax.dtypes.float0), np.zeros(targets.shape, jax.dtypes.float0)


_gather_with_known_inverse.defvjp(_gather_fwd, _gather_bwd)
