"""Cross-entropy of a linear output layer in XLA: chunks of rows, with the gradient computed in the forward pass.

The logits of a chunk are reduced to its losses and to the gradients of hidden, weight and bias before the next chunk
starts, so at most `MAX_LOGITS` logits exist at a time; on a CPU these stay in the cache. Chunk p of P consists of the
rows p, p + P, p + 2P, ...: if rows are sharded over devices, every chunk is sharded in the same way.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.dispatch import platform
from recallax.pallas_kernels.einsum_f32 import einsum_f32
from recallax.pallas_kernels.linear_cross_entropy.reference import LinearCrossEntropyArgs

MAX_LOGITS = {"cpu": 2**20, "gpu": 2**28, "tpu": 2**28}
"""Upper bound of the logits of a chunk, by platform: the size of the cache on a CPU, a gigabyte elsewhere."""
MIN_CHUNK_ROWS = 64
"""Lower bound of the rows of a chunk for any vocabulary: matrix products of fewer rows are inefficient."""


class _HeadParams(NamedTuple):
    weight: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


class _TokenRows(NamedTuple):
    hidden: Float[Array, "R D"]
    targets: Int[Array, " R"]
    loss_weights: Float[Array, " R"]


class _RowLosses(NamedTuple):
    objective: Float[Array, " R"]
    """Loss and z-loss of the row, not multiplied by its weight."""
    loss: Float[Array, " R"]
    correct: Bool[Array, " R"]


def linear_cross_entropy(
    args: LinearCrossEntropyArgs,
) -> tuple[Float[Array, ""], Float[Array, " M"], Bool[Array, " M"]]:
    """Compute the cross-entropy in chunks of rows.

    The arguments and the result are those of `linear_cross_entropy.reference.linear_cross_entropy`.
    """
    hidden, weight, bias, targets, loss_weights, soft_cap, z_loss = args
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
        losses, grad = _row_losses(soft_cap, z_loss, head, part)
        grad *= part.loss_weights[:, None]
        rounded = grad.astype(part.hidden.dtype)
        hidden = einsum_f32("rv,vd->rd", rounded, head.weight.astype(rounded.dtype)).astype(part.hidden.dtype)
        # Summed as [D, V]: on XLA's CPU backend this takes a third of the time of [V, D].
        sums = (sums[0] + einsum_f32("rd,rv->dv", part.hidden, rounded), sums[1] + jnp.sum(grad, axis=0))
        return sums, (losses, hidden)

    vocab, width = head.weight.shape
    zeros = (jnp.zeros((width, vocab), jnp.float32), jnp.zeros(vocab, jnp.float32))
    (weight, bias), (losses, hidden) = _scan_row_chunks(body, zeros, vocab, rows)
    head_grads = _HeadParams(
        weight.T.astype(head.weight.dtype), None if head.bias is None else bias.astype(head.bias.dtype)
    )
    return _outputs(rows, losses), (head_grads, hidden, losses.objective)


def _backward(soft_cap: float | None, z_loss: float, residuals: tuple[_HeadParams, Array, Array], grads: tuple):
    head, hidden, objective = residuals
    factor = grads[0]
    head = jax.tree.map(lambda x: factor.astype(x.dtype) * x, head)
    return head, _TokenRows(factor.astype(hidden.dtype) * hidden, None, factor * objective)  # pyright: ignore


_loss_and_accuracy.defvjp(_forward, _backward)


def _row_losses(
    soft_cap: float | None, z_loss: float, head: _HeadParams, part: _TokenRows
) -> tuple[_RowLosses, Float[Array, "R V"]]:
    """Return the losses of a chunk, and the gradient of each row's objective with respect to its uncapped logits."""
    raw = einsum_f32("rd,vd->rv", part.hidden, head.weight.astype(part.hidden.dtype))
    raw = raw if head.bias is None else raw + head.bias.astype(jnp.float32)[None]
    tanh = None if soft_cap is None else jnp.tanh(raw / soft_cap)
    logits = raw if tanh is None or soft_cap is None else soft_cap * tanh
    is_target = jnp.arange(logits.shape[1])[None] == part.targets[:, None]
    target = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    top = jnp.max(logits, axis=1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=1, keepdims=True)
    log_partition = (top + jnp.log(total))[:, 0]
    loss = log_partition - target
    correct = jnp.sum(logits >= target[:, None], axis=1) == 1
    grad = exponentials * ((1 + 2 * z_loss * log_partition[:, None]) / total) - is_target.astype(jnp.float32)
    grad = grad if tanh is None else grad * (1 - tanh * tanh)
    return _RowLosses(loss + z_loss * log_partition**2, loss, correct), grad


def _outputs(rows: _TokenRows, losses: _RowLosses) -> tuple[Array, Array, Array]:
    return jnp.sum(rows.loss_weights * losses.objective), losses.loss, losses.correct


def _scan_row_chunks(body, carry, vocab: int, rows: _TokenRows):
    """Scan `body` over chunks of rows and undo the chunking of its stacked outputs."""
    count = rows.targets.shape[0]
    parts = _num_chunks(count, max(MIN_CHUNK_ROWS, MAX_LOGITS[platform()] // vocab))
    if parts == 1:
        return body(carry, rows)
    carry, out = jax.lax.scan(body, carry, jax.tree.map(lambda x: _interleave_rows(x, parts), rows))
    return carry, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:count], out)


def _num_chunks(rows: int, chunk: int) -> int:
    """Number of chunks: the smallest divisor of `rows` below twice the minimum, else the minimum, which pads rows."""
    least = -(-rows // chunk)
    return next((n for n in range(least, 2 * least) if rows % n == 0), least)


def _interleave_rows(x: Array, num_chunks: int) -> Array:
    """[M, ...] -> [P, M / P, ...]: row m goes to chunk m mod P; the end is padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[0] % num_chunks)] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(-1, num_chunks, *x.shape[1:]), 0, 1)
