# pyright: strict
"""Cells with a matrix memory per value head, updated by one delta-rule step per token.

    q, k = l2_normalize(projections),   beta = sigmoid(projection) or 2 sigmoid(projection)
    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)

Members differ in the decay alpha.
"""

import abc
from collections.abc import Mapping

from jaxtyping import Array, Float, Int

from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import HeadDims
from recallax.layers.norm import l2_normalize
from recallax.layers.recurrence_gates import beta_gate, split_heads
from recallax.layers.short_convolution import ShortConvolution


class DeltaRuleCell(MatrixCell):
    """Matrix memory with the delta rule, with normalized queries and keys and a beta gate per value head."""

    def __init__(self, head_dims: HeadDims, conv: ShortConvolution | None, allow_neg_eigval: bool):
        super().__init__(head_dims, conv)
        self.allow_neg_eigval = allow_neg_eigval

    @abc.abstractmethod
    def log_decay(self, projections: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "..."] | None:
        """Compute the logarithm of the decay.

        Args:
            projections: Projected tokens by name, after the convolution.

        Returns:
            The log-decay per head [B, T, H] or per channel of the key [B, T, H, K]; None: no decay.
        """

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        num_heads, num_v_heads, head_k_dim, _ = self.head_dims
        q, k, v = (
            split_heads(projections[name], n) for name, n in (("q", num_heads), ("k", num_heads), ("v", num_v_heads))
        )
        beta = beta_gate(projections["beta"], self.allow_neg_eigval)
        log_decay = self.log_decay(projections)
        return RecurrenceInputs(l2_normalize(q) * head_k_dim**-0.5, l2_normalize(k), v, log_decay, beta, beta)
