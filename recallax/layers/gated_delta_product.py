"""Gated DeltaProduct: several delta-rule steps per token, of which the first decays and the last is read.

    S_{t,j} = (I - beta_tj k_tj k_tj^T) S_{t,j-1} + beta_tj k_tj v_tj^T,  j = 1..n,   S_{t,0} = alpha_t S_{t-1,n}
    o_t = S_{t,n}^T q_t / sqrt(K);   everything else as in Gated DeltaNet

A product of n generalised Householder reflections can permute: with strengths up to 2 it tracks states that one
reflection per token cannot. State: K V float32 per head, whatever n, and the last 3 inputs of the convolution.
Source: Siems et al. 2025 (DeltaProduct, arXiv 2502.10297), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError, added
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import DecayGate, strength
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.norm import unit
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class GatedDeltaProduct(MemoryConfig):
    """Several delta-rule steps per token."""

    steps: int = 2
    """Delta-rule steps per token; 1 is Gated DeltaNet."""
    heads: int = 4
    key_dim: int | None = None
    """Width of queries and keys per head; None is 3/4 of d_model / heads."""
    value_dim: int | None = None
    """Width of values per head; None is twice the keys'."""
    max_beta: float = 2.0
    """Largest strength; above 1 the transition has negative eigenvalues."""
    conv: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    eps: float = added(1e-5)
    """Of the output norm."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; gated_delta_product needs at least 1 step per token")

    def sizes(self, d_model: int) -> Sizes:
        keys = self.key_dim or max(1, 3 * divide_heads("gated_delta_product", d_model, self.heads) // 4)
        return Sizes(self.heads, self.heads, keys, self.value_dim or 2 * keys)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        _, heads, keys, values = self.sizes(d_model)
        each = self.steps * heads
        widths = {"k": each * keys, "v": each * values, "beta": each, "decay": heads}
        return Streams({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "GatedDeltaProductCell":
        _, heads, keys, values = sizes = self.sizes(d_model)
        width = heads * (keys + self.steps * (keys + values))
        conv = ShortConvolution(width, self.conv, precision=precision, rngs=rngs) if self.conv else None
        gate = DecayGate(heads, heads, precision=precision, rngs=rngs)
        return GatedDeltaProductCell(sizes, conv, gate, self.max_beta, self.steps)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        gate = Linear(d_model, heads * values, precision=precision, rngs=rngs)
        inner = heads * values
        return Readout(inner, d_model, site, groups=heads, gate=gate, eps=self.eps, precision=precision, rngs=rngs)


class GatedDeltaProductCell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution | None, gate: DecayGate, max_beta: float, steps: int):
        super().__init__(sizes, conv)
        self.gate = gate
        self.max_beta = max_beta
        self.micro = steps

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        heads, steps = self.sizes.heads, self.micro
        batch, length = positions.shape
        k, v, beta = (
            streams[name].reshape(batch, length * steps, heads, -1) for name in ("k", "v", "beta")
        )  # channels are laid out step by step
        q = unit(streams["q"].reshape(batch, length, heads, -1)) * self.sizes.keys**-0.5
        decay = self.gate(self.gate.dt(streams["decay"]))
        log_decay = jnp.zeros((batch, length, steps, heads), decay.dtype).at[:, :, 0].set(decay)
        strengths = strength(beta[..., 0], self.max_beta)
        q = jnp.repeat(q, steps, axis=1)  # read after every step; the last reading counts
        return Recurrence(q, unit(k), v, log_decay.reshape(batch, -1, heads), strengths, strengths)
