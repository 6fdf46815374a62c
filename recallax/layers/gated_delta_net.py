"""Gated DeltaNet: the delta rule with a decay per token and value head; queries and keys may serve several value heads.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    alpha_t = exp(-exp(a) softplus(x_t W_a + b)),   beta_t = max_beta sigmoid(x_t W_b),   q, k = unit(silu(conv(x W)))
    y_t = W_o [ rms_head(o_t) * silu(x_t W_g) ]

State: K V float32 per value head and the last 3 inputs of the convolution.
Source: Yang et al. 2024 (arXiv 2412.06464), equation 10 and section 3.4; grouped value heads as in Qwen3-Next.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import DecayGate, heads_of, strength
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.norm import unit
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(MemoryConfig):
    """The delta rule with a scalar decay."""

    heads: int = 4
    """Heads of queries and keys."""
    value_heads: int | None = None
    """A multiple of `heads`; None is the same number."""
    key_dim: int | None = None
    """Width of queries and keys per head; None is 3/4 of d_model / heads, as published."""
    value_dim: int | None = None
    """Width of values per value head; None is twice the keys'."""
    max_beta: float = 1.0
    """Largest strength; 2 allows negative eigenvalues."""
    conv: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    eps: float = 1e-5
    """Of the output norm."""

    def sizes(self, d_model: int) -> Sizes:
        heads = self.value_heads or self.heads
        divide_heads("gated_delta_net's value heads over key heads", heads, self.heads)
        keys = self.key_dim or max(1, 3 * divide_heads("gated_delta_net", d_model, self.heads) // 4)
        return Sizes(self.heads, heads, keys, self.value_dim or 2 * keys)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        groups, heads, keys, values = self.sizes(d_model)
        widths = {"k": groups * keys, "v": heads * values, "beta": heads, "decay": heads}
        return Streams({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "GatedDeltaNetCell":
        groups, heads, keys, values = sizes = self.sizes(d_model)
        width = 2 * groups * keys + heads * values
        conv = ShortConvolution(width, self.conv, precision=precision, rngs=rngs) if self.conv else None
        gate = DecayGate(heads, heads, precision=precision, rngs=rngs)
        return GatedDeltaNetCell(sizes, conv, gate, self.max_beta)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        inner = heads * values
        gate = Linear(d_model, inner, precision=precision, rngs=rngs)
        return Readout(inner, d_model, site, groups=heads, gate=gate, eps=self.eps, precision=precision, rngs=rngs)


class GatedDeltaNetCell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution | None, gate: DecayGate, max_beta: float):
        super().__init__(sizes, conv)
        self.gate = gate
        self.max_beta = max_beta

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        groups, heads, keys, _ = self.sizes
        q, k, v = (heads_of(streams[name], n) for name, n in (("q", groups), ("k", groups), ("v", heads)))
        beta = strength(streams["beta"], self.max_beta)
        log_decay = self.gate(self.gate.dt(streams["decay"]))
        return Recurrence(unit(q) * keys**-0.5, unit(k), v, log_decay, beta, beta)
