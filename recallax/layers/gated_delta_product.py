"""Gated DeltaProduct: several delta-rule steps per token; the first one decays, and the token reads after the last.

    S_{t,j} = (I - beta_tj k_tj k_tj^T) S_{t,j-1} + beta_tj k_tj v_tj^T,  j = 1..n,   S_{t,0} = alpha_t S_{t-1,n}
    o_t = S_{t,n}^T q_t / sqrt(K);   everything else as in Gated DeltaNet

A product of n generalised Householder reflections can represent permutations: with beta up to 2 it tracks states that
one reflection per token cannot. State: K V float32 per head for any n, and the last 3 inputs of the convolution.
Source: Siems et al. 2025 (DeltaProduct, arXiv 2502.10297), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added_field, require_at_least
from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, Projections, head_dim_of
from recallax.layers.matrix_memory import MatrixCell, RecurrenceInputs
from recallax.layers.memory import GatedMemoryConfig, HeadDims
from recallax.layers.norm import l2_normalize
from recallax.layers.recurrence_gates import DecayGate, beta_gate
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class GatedDeltaProduct(GatedMemoryConfig):
    """Several delta-rule steps per token (Gated DeltaProduct)."""

    num_householder: int = 2
    """Delta-rule steps per token; 1 is Gated DeltaNet."""
    num_heads: int = 4
    """Number of heads."""
    head_k_dim: int | None = None
    """Width of queries and keys per head; None: 3/4 of d_model / num_heads."""
    head_v_dim: int | None = None
    """Width of values per head; None: 2 * head_k_dim."""
    allow_neg_eigval: bool = True
    """Double the beta gate to (0, 2), so that transitions may have negative eigenvalues (Grazzi et al. 2024)."""
    conv_size: int = 4
    """Taps of the short convolution; 0: no convolution."""
    norm_eps: float = added_field(1e-5)
    """Added to the mean square in the output norm."""

    def __post_init__(self) -> None:
        require_at_least(1, num_householder=self.num_householder)

    def head_dims(self, d_model: int) -> HeadDims:
        head_k_dim = self.head_k_dim or max(1, 3 * head_dim_of("gated_delta_product", d_model, self.num_heads) // 4)
        return HeadDims(self.num_heads, self.num_heads, head_k_dim, self.head_v_dim or 2 * head_k_dim)

    def kv_proj(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Projections:
        _, num_heads, head_k_dim, head_v_dim = self.head_dims(d_model)
        steps = self.num_householder * num_heads
        widths = {"k": steps * head_k_dim, "v": steps * head_v_dim, "beta": steps, "decay": num_heads}
        return Projections({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, layer: LayerInfo, *, precision: Precision, rngs: nnx.Rngs) -> "GatedDeltaProductCell":
        _, num_heads, head_k_dim, head_v_dim = dims = self.head_dims(d_model)
        width = num_heads * (head_k_dim + self.num_householder * (head_k_dim + head_v_dim))
        conv = ShortConvolution(width, self.conv_size, precision=precision, rngs=rngs) if self.conv_size else None
        gate = DecayGate(num_heads, num_heads, precision=precision, rngs=rngs)
        return GatedDeltaProductCell(dims, conv, gate, self.allow_neg_eigval, self.num_householder)


class GatedDeltaProductCell(MatrixCell):
    """Matrix memory with `num_householder` delta-rule steps and one decay per token."""

    def __init__(
        self,
        head_dims: HeadDims,
        conv: ShortConvolution | None,
        gate: DecayGate,
        allow_neg_eigval: bool,
        num_householder: int,
    ):
        super().__init__(head_dims, conv)
        self.gate = gate
        self.allow_neg_eigval = allow_neg_eigval
        self.num_householder = num_householder

    def recurrence_inputs(
        self, projections: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]
    ) -> RecurrenceInputs:
        num_heads, steps = self.head_dims.num_v_heads, self.num_householder
        batch, length = positions.shape
        # Channels are ordered by step first, then by head.
        k, v, beta = (projections[name].reshape(batch, length * steps, num_heads, -1) for name in ("k", "v", "beta"))
        q = l2_normalize(projections["q"].reshape(batch, length, num_heads, -1)) * self.head_dims.head_k_dim**-0.5
        decay = self.gate(self.gate.dt(projections["decay"]))
        log_decay = jnp.zeros((batch, length, steps, num_heads), decay.dtype).at[:, :, 0].set(decay)
        beta = beta_gate(beta[..., 0], self.allow_neg_eigval)
        q = jnp.repeat(q, steps, axis=1)  # the op reads after every step; `MatrixCell.run` keeps the last output
        return RecurrenceInputs(q, l2_normalize(k), v, log_decay.reshape(batch, -1, num_heads), beta, beta)
