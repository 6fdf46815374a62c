"""The cross-entropy of a linear readout in chunks of rows, with its gradient taken in the forward pass.

Each chunk's logits turn into its losses and into the gradients of hidden, weight and bias before the next chunk begins,
so at most `MAX_LOGITS` of them exist, which on a CPU stay in its cache. Chunk p holds the rows p, p + P, p + 2P, ...:
where rows are spread over devices, each then keeps its share of every chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.dispatch import platform
from recallax.pallas_kernels.einsum_f32 import einsum_f32

MAX_LOGITS = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**28}
"""Most logits at a time, by platform: on a CPU what its cache holds, elsewhere a gigabyte."""
MIN_CHUNK_ROWS = 64
"""Rows of a chunk however large the vocabulary: fewer leave the product idle."""


class _HeadParams(NamedTuple):
    weight: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


class _TokenRows(NamedTuple):
    hidden: Float[Array, "R D"]
    targets: Int[Array, " R"]
    loss_weights: Float[Array, " R"]


class _RowLosses(NamedTuple):
    objective: Float[Array, " R"]
    """Loss and z-loss, before the row's weight."""
    loss: Float[Array, " R"]
    correct: Bool[Array, " R"]


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " M"],
    loss_weights: Float[Array, " M"],
    soft_cap: float | None,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, " M"], Bool[Array, " M"]]:
    """The op's XLA form."""
    return _loss_and_accuracy(soft_cap, z_loss, _HeadParams(weight, bias), _TokenRows(hidden, targets, loss_weights))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_and_accuracy(
    soft_cap: float | None, z_loss: float, head: _HeadParams, rows: _TokenRows
) -> tuple[Array, Array, Array]:
    def body(_: None, part: _TokenRows) -> tuple[None, _RowLosses]:
        return None, _row_losses(soft_cap, z_loss, head, part)[0]

    _, losses = _scan_row_chunks(body, None, head.weight.shape[0], rows)
    return _outputs(rows, losses)


def _forward(soft_cap: float | None, z_loss: float, head: _HeadParams, rows: _TokenRows):
    def body(sums: tuple[Array, Array], part: _TokenRows) -> tuple[tuple[Array, Array], tuple[_RowLosses, Array]]:
        losses, slope = _row_losses(soft_cap, z_loss, head, part)
        slope *= part.loss_weights[:, None]
        narrow = slope.astype(part.hidden.dtype)
        hidden = einsum_f32("rv,vd->rd", narrow, head.weight.astype(narrow.dtype)).astype(part.hidden.dtype)
        # Summed as [D, V]: XLA's CPU backend takes a third of the time of [V, D] for it.
        sums = (sums[0] + einsum_f32("rd,rv->dv", part.hidden, narrow), sums[1] + jnp.sum(slope, axis=0))
        return sums, (losses, hidden)

    vocab, width = head.weight.shape
    zeros = (jnp.zeros((width, vocab), jnp.float32), jnp.zeros(vocab, jnp.float32))
    (weight, bias), (losses, hidden) = _scan_row_chunks(body, zeros, vocab, rows)
    slopes = _HeadParams(
        weight.T.astype(head.weight.dtype), None if head.bias is None else bias.astype(head.bias.dtype)
    )
    return _outputs(rows, losses), (slopes, hidden, losses.objective)


def _backward(soft_cap: float | None, z_loss: float, residuals: tuple[_HeadParams, Array, Array], grads: tuple):
    head, hidden, objective = residuals
    factor = grads[0]
    head = jax.tree.map(lambda x: factor.astype(x.dtype) * x, head)
    return head, _TokenRows(factor.astype(hidden.dtype) * hidden, None, factor * objective)  # pyright: ignore


_loss_and_accuracy.defvjp(_forward, _backward)


def _row_losses(
    soft_cap: float | None, z_loss: float, head: _HeadParams, part: _TokenRows
) -> tuple[_RowLosses, Float[Array, "R V"]]:
    """A chunk's losses, and the gradient of each row's objective in its raw logits."""
    raw = einsum_f32("rd,vd->rv", part.hidden, head.weight.astype(part.hidden.dtype))
    raw = raw if head.bias is None else raw + head.bias.astype(jnp.float32)[None]
    bent = None if soft_cap is None else jnp.tanh(raw / soft_cap)
    logits = raw if bent is None or soft_cap is None else soft_cap * bent
    is_target = jnp.arange(logits.shape[1])[None] == part.targets[:, None]
    target = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    top = jnp.max(logits, axis=1, keepdims=True)
    powers = jnp.exp(logits - top)
    total = jnp.sum(powers, axis=1, keepdims=True)
    size = (top + jnp.log(total))[:, 0]
    loss = size - target
    right = jnp.sum(logits >= target[:, None], axis=1) == 1
    slope = powers * ((1 + 2 * z_loss * size[:, None]) / total) - is_target.astype(jnp.float32)
    slope = slope if bent is None else slope * (1 - bent * bent)
    return _RowLosses(loss + z_loss * size**2, loss, right), slope


def _outputs(rows: _TokenRows, losses: _RowLosses) -> tuple[Array, Array, Array]:
    return jnp.sum(rows.loss_weights * losses.objective), losses.loss, losses.correct


def _scan_row_chunks(body, carry, vocab: int, rows: _TokenRows):
    """`scan` over chunks of rows; what it stacks comes back as rows."""
    count = rows.targets.shape[0]
    parts = _num_chunks(count, max(MIN_CHUNK_ROWS, MAX_LOGITS[platform()] // vocab))
    if parts == 1:
        return body(carry, rows)
    carry, out = jax.lax.scan(body, carry, jax.tree.map(lambda x: _interleave_rows(x, parts), rows))
    return carry, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:count], out)


def _num_chunks(rows: int, chunk: int) -> int:
    """How many chunks: a divisor of `rows`, where there is one at most twice as large as needed."""
    least = -(-rows // chunk)
    return next((n for n in range(least, 2 * least) if rows % n == 0), least)


def _interleave_rows(x: Array, num_chunks: int) -> Array:
    """[M, ...] -> [P, M / P, ...], rows dealt out in turn; what is missing at the end is zero."""
    x = jnp.pad(x, [(0, -x.shape[0] % num_chunks)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(-1, num_chunks, *x.shape[1:]), 0, 1)
