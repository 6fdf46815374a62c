"""RetNet's retention: linear attention with a decay that is constant per head, and rotary positions.

    S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   gamma_h = 1 - 2^{-5-h}
    y_t = W_o [ rms_head(o_t) * silu(x_t W_g) ]

State: K V float32 per head, V = 2 K by default. Source: Sun et al. 2023 (RetNet, arXiv 2307.08621), equations 6 and 8,
with RMSNorm for their GroupNorm, as the implementations in use have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import heads_of
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.readout import Readout
from recallax.layers.rotary import rotary
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class RetNet(MemoryConfig):
    """Retention with a decay per head."""

    heads: int = 8
    key_dim: int | None = None
    """Width of queries and keys per head, an even number; None is d_model / heads."""
    value_dim: int | None = None
    """Width of values per head; None is twice the keys'."""
    rotary_base: float = 10_000.0
    eps: float = added(1e-5)
    """Of the output norm."""

    def sizes(self, d_model: int) -> Sizes:
        keys = self.key_dim or divide_heads("retnet", d_model, self.heads)
        return Sizes(self.heads, self.heads, keys, self.value_dim or 2 * keys)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        _, heads, keys, values = self.sizes(d_model)
        widths = {"k": heads * keys, "v": heads * values}
        return Streams({name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()})

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "RetNetCell":
        return RetNetCell(self.sizes(d_model), self.rotary_base)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        gate = Linear(d_model, heads * values, precision=precision, rngs=rngs)
        inner = heads * values
        return Readout(inner, d_model, site, groups=heads, gate=gate, eps=self.eps, precision=precision, rngs=rngs)


class RetNetCell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, base: float):
        super().__init__(sizes)
        self.base = base

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        heads, keys = self.sizes.heads, self.sizes.keys
        q, k = (rotary(heads_of(streams[name], heads), positions, self.base) for name in ("q", "k"))
        gamma = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=jnp.float32))))
        return Recurrence(q * keys**-0.5, k, heads_of(streams["v"], heads), log_decay=gamma)
