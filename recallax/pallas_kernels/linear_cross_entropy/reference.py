"""Definition of the cross-entropy of a linear output layer: all logits at once, in float32 or wider."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import accumulator_dtype


class LinearCrossEntropyArgs(NamedTuple):
    """Checked arguments of an implementation of `linear_cross_entropy`."""

    hidden: Float[Array, "M D"]
    weight: Float[Array, "V D"]
    bias: Float[Array, " V"] | None
    targets: Int[Array, " M"]
    loss_weights: Float[Array, " M"]
    """Float32 or wider."""
    soft_cap: float | None
    z_loss: float


def linear_cross_entropy(
    args: LinearCrossEntropyArgs,
) -> tuple[Float[Array, ""], Float[Array, " M"], Bool[Array, " M"]]:
    """Return the total, the losses, and True where the target's logit is larger than all others."""
    hidden, weight, bias, targets, loss_weights, soft_cap, z_loss = args
    dtype = accumulator_dtype(hidden.dtype)
    logits = hidden.astype(dtype) @ weight.astype(dtype).T
    logits = logits if bias is None else logits + bias.astype(dtype)[None]
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    clipped = jnp.clip(targets, 0, logits.shape[1] - 1)
    target = jnp.take_along_axis(logits, clipped[:, None], axis=1)[:, 0]
    log_partition = jax.nn.logsumexp(logits, axis=1)
    loss = log_partition - target
    correct = jnp.sum(logits >= target[:, None], axis=1) == 1
    return jnp.sum(loss_weights * (loss + z_loss * log_partition**2)), jax.lax.stop_gradient(loss), correct
