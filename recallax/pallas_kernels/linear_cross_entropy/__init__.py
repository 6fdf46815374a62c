"""Cross-entropy of a linear output layer that never materialises the logits of all rows.

    z_n = W h_n + b                   with a soft cap c: z_n = c tanh(z_n / c)
    l_n = logsumexp(z_n) - z_n[target_n]
    total = sum_n s_n (l_n + a logsumexp(z_n)^2)

The loss weights s are known before the softmax, so the gradient of `total` is computed together with the logits and no
second pass is needed. Source of the soft cap: Gemma 2 (arXiv 2408.00118), section 2; of the term with factor a
(z-loss): PaLM (arXiv 2204.02311), section 5.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import accumulator_dtype
from recallax.pallas_kernels.dispatch import call_implementation, require
from recallax.pallas_kernels.linear_cross_entropy import reference, xla
from recallax.pallas_kernels.linear_cross_entropy.reference import LinearCrossEntropyArgs

__all__ = ["IMPLEMENTATIONS", "LinearCrossEntropyOutput", "linear_cross_entropy"]

IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "xla": xla.linear_cross_entropy}


class LinearCrossEntropyOutput(NamedTuple):
    """Losses of M rows; gradients flow through `total` only."""

    total: Float[Array, ""]
    """Weighted sum of the losses and the z-loss."""
    loss: Float[Array, " M"]
    """Cross-entropy l in nats, independent of the row's weight."""
    correct: Bool[Array, " M"]
    """True if the target's logit is larger than all others."""


def linear_cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    loss_weights: Float[Array, " M"],
    *,
    bias: Float[Array, " V"] | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    implementation: str | None = None,
) -> LinearCrossEntropyOutput:
    """Compute the cross-entropy of M rows in float32; products are computed in hidden's dtype with float32 sums.

    Args:
        hidden: Hidden states; differentiable, as are weight, bias and loss_weights.
        weight: Output embedding of V tokens.
        targets: Target tokens; any value where the loss weight is 0.
        loss_weights: Weight s of each row in `total`; rows of weight 0 have no gradient.
        bias: Bias of the logits; None: 0.
        soft_cap: Soft cap c of the logits; None: no cap.
        z_loss: Factor a of the squared log-partition.
        implementation: Name of the implementation; None selects one for the device.

    Returns:
        Total, losses and correctness of each row.

    Raises:
        ValueError: Shapes do not match, or the soft cap is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> hidden, weight = jnp.eye(2), jnp.array([[8.0, 0.0], [0.0, 8.0]])
        >>> result = linear_cross_entropy(hidden, weight, jnp.array([0, 0]), jnp.ones(2))
        >>> result.correct.tolist()
        [True, False]
    """
    op = "linear_cross_entropy"
    rows, width = hidden.shape
    require(op, rows >= 1, f"hidden has {rows} rows; it needs at least 1")
    require(op, weight.shape[1:] == (width,), f"weight has shape {weight.shape}; it must be [V, {width}]")
    for name, part in (("targets", targets), ("loss_weights", loss_weights)):
        require(op, part.shape == (rows,), f"{name} has shape {part.shape}; it must be {(rows,)}")
    vocab = weight.shape[:1]
    require(op, bias is None or bias.shape == vocab, f"bias is not {vocab}, one number per row of weight")
    require(op, soft_cap is None or soft_cap > 0, f"soft_cap is {soft_cap}; it must be above 0")
    loss_weights = loss_weights.astype(accumulator_dtype(hidden.dtype))
    args = LinearCrossEntropyArgs(hidden, weight, bias, targets, loss_weights, soft_cap, z_loss)
    return LinearCrossEntropyOutput(*call_implementation(op, IMPLEMENTATIONS, implementation, args))
