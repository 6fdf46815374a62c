"""Cross-entropy of a linear readout, without ever holding the logits of all rows.

    z_n = W h_n + b                   with a cap c: z_n = c tanh(z_n / c)
    l_n = logsumexp(z_n) - z_n[target_n]
    total = sum_n s_n (l_n + a logsumexp(z_n)^2)

The weights s are known before the softmax, so the gradient of `total` is formed where the logits are and no second
pass is needed. Source of the cap: Gemma 2 (arXiv 2408.00118), section 2; of the a term (z-loss): PaLM (arXiv
2204.02311), section 5.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from recallax.pallas_kernels.chunking import accumulator_dtype
from recallax.pallas_kernels.dispatch import call_implementation, require
from recallax.pallas_kernels.linear_cross_entropy import reference, xla

IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "xla": xla.linear_cross_entropy}


class LinearCrossEntropyOutput(NamedTuple):
    """What the readout makes of each row; gradients flow through `total` alone."""

    total: Float[Array, ""]
    loss: Float[Array, " M"]
    """l, in nats, whatever the row's weight."""
    correct: Bool[Array, " M"]
    """No other token has a logit as large as the target's."""


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
    """Float32 scores of M rows. Products are taken in hidden's dtype with float32 sums.

    scale: s, the weight of each row in `total`; a row of weight 0 gives no gradient, whatever its target.
    Gradients reach hidden, weight, bias and scale. Raises ValueError where shapes disagree.
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
    return LinearCrossEntropyOutput(
        *call_implementation(
            op, IMPLEMENTATIONS, implementation, hidden, weight, bias, targets, loss_weights, soft_cap, z_loss
        )
    )
