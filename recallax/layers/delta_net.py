"""DeltaNet: a linear memory that erases what it held under a key before it writes there.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    q, k = unit(silu(conv(x W))),   v = silu(conv(x W_v)),   beta_t = sigmoid(x_t W_b) per head
    y_t = W_o rms_head(o_t)

State: K V float32 per head and the last 3 inputs of the convolution.
Source: Yang et al. 2024 (arXiv 2406.06484), sections 2.2 and 3.3; negative eigenvalues (max_beta 2) Grazzi et al. 2024
(arXiv 2411.12537).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import heads_of, strength
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.norm import unit
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class DeltaNet(MemoryConfig):
    """The delta rule without a decay."""

    heads: int = 4
    key_dim: int | None = None
    """Width of queries and keys per head; None is d_model / heads."""
    value_dim: int | None = None
    """Width of values per head; None is the keys'."""
    max_beta: float = 1.0
    """Largest strength; 2 allows negative eigenvalues, with which a memory can count modulo 2."""
    conv: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    eps: float = added(1e-5)
    """Of the output norm."""

    def sizes(self, d_model: int) -> Sizes:
        keys = self.key_dim or divide_heads("delta_net", d_model, self.heads)
        return Sizes(self.heads, self.heads, keys, self.value_dim or keys)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        _, heads, keys, values = self.sizes(d_model)
        widths = {"k": heads * keys, "v": heads * values, "beta": heads}
        return Streams({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "DeltaNetCell":
        _, heads, keys, values = sizes = self.sizes(d_model)
        width = heads * (2 * keys + values)
        conv = ShortConvolution(width, self.conv, precision=precision, rngs=rngs) if self.conv else None
        return DeltaNetCell(sizes, conv, self.max_beta)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        inner = heads * values
        return Readout(inner, d_model, site, groups=heads, gate=None, eps=self.eps, precision=precision, rngs=rngs)


class DeltaNetCell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution | None, max_beta: float):
        super().__init__(sizes, conv)
        self.max_beta = max_beta

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        q, k, v = (heads_of(streams[name], self.sizes.heads) for name in ("q", "k", "v"))
        beta = strength(streams["beta"], self.max_beta)
        return Recurrence(unit(q) * self.sizes.keys**-0.5, unit(k), v, erase=beta, write=beta)
