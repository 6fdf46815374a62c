"""The definition of the cross-entropy of a linear readout: all logits at once, in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import accumulator_dtype


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " M"],
    loss_weights: Float[Array, " M"],
    soft_cap: float | None,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, " M"], Bool[Array, " M"]]:
    """Total, losses, and where the target alone has the largest logit."""
    wide = accumulator_dtype(hidden.dtype)
    logits = hidden.astype(wide) @ weight.astype(wide).T
    logits = logits if bias is None else logits + bias.astype(wide)[None]
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    known = jnp.clip(targets, 0, logits.shape[1] - 1)
    target = jnp.take_along_axis(logits, known[:, None], axis=1)[:, 0]
    size = jax.nn.logsumexp(logits, axis=1)
    loss = size - target
    right = jnp.sum(logits >= target[:, None], axis=1) == 1
    return jnp.sum(loss_weights * (loss + z_loss * size**2)), jax.lax.stop_gradient(loss), right
