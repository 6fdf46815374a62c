"""Gated linear attention: a decay per token and channel of the key, from a low-rank projection.

    S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   alpha_t = sigmoid(x_t W_1 W_2 + b)^{1/16}
    y_t = W_o [ rms_head(o_t) * silu(x_t W_g) ]

State: K V float32 per head; by default 4 heads, all keys together d / 2 wide and all values d.
Source: Yang et al. 2023 (GLA, arXiv 2312.06635), section 4.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, LowRank, Streams
from recallax.layers.gates import heads_of
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class GLA(MemoryConfig):
    """Gated linear attention."""

    heads: int = 4
    key_dim: int | None = None
    """Width of queries and keys per head; None is d_model / heads / 2."""
    value_dim: int | None = None
    """Width of values per head; None is d_model / heads."""
    gate_rank: int = 16
    gate_power: float = 16.0
    """The gate is the sigmoid to the power 1 / this: larger forgets more slowly."""
    conv: int = 0
    """Taps of the short convolution on queries, keys and values; 0 leaves it out, as published."""
    eps: float = added(1e-5)
    """Of the output norm."""

    def sizes(self, d_model: int) -> Sizes:
        values = self.value_dim or divide_heads("gla", d_model, self.heads)
        return Sizes(self.heads, self.heads, self.key_dim or max(1, values // 2), values)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        _, heads, keys, values = self.sizes(d_model)
        return Streams(
            {
                "k": Linear(d_model, heads * keys, precision=precision, rngs=rngs),
                "v": Linear(d_model, heads * values, precision=precision, rngs=rngs),
                "decay": LowRank(d_model, self.gate_rank, heads * keys, precision=precision, rngs=rngs, bias=True),
            }
        )

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "GLACell":
        _, heads, keys, values = sizes = self.sizes(d_model)
        width = heads * (2 * keys + values)
        conv = ShortConvolution(width, self.conv, precision=precision, rngs=rngs) if self.conv else None
        return GLACell(sizes, conv, self.gate_power)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        gate = Linear(d_model, heads * values, precision=precision, rngs=rngs)
        inner = heads * values
        return Readout(inner, d_model, site, groups=heads, gate=gate, eps=self.eps, precision=precision, rngs=rngs)


class GLACell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution | None, power: float):
        super().__init__(sizes, conv)
        self.power = power

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        q, k, v, decay = (heads_of(streams[name], self.sizes.heads) for name in ("q", "k", "v", "decay"))
        log_decay = jax.nn.log_sigmoid(decay.astype(jnp.float32)) / self.power
        return Recurrence(q * self.sizes.keys**-0.5, k, v, log_decay=log_decay)
