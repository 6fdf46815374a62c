"""Kimi Delta Attention: the delta rule with a decay per token and channel of the key.

    S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    bounded:  log alpha_t = floor * sigmoid(exp(a) (x_t W_1 W_2 + b))        floor = -5
    softplus: log alpha_t = -exp(a) softplus(x_t W_1 W_2 + b)
    y_t = W_o [ rms_head(o_t) * sigmoid(x_t W_3 W_4) ]

with a per head, b per channel, low-rank projections of the values' width, q, k = unit(silu(conv(x W))). State: K V
float32 per head and the last 3 inputs of the convolution. Source: Kimi Linear (arXiv 2510.26692), section 4, which has
the softplus gate; the bounded one is what the later, larger models use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError, added
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, LowRank, Streams, parameter
from recallax.layers.gates import DecayGate, heads_of, start_of_dt, strength
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.norm import unit
from recallax.layers.readout import Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class KDA(MemoryConfig):
    """Kimi Delta Attention."""

    heads: int = 4
    key_dim: int | None = None
    """Width of queries and keys per head; None is d_model / heads."""
    value_dim: int | None = None
    """Width of values per head; None is the keys'."""
    gate: Literal["bounded", "softplus"] = "bounded"
    floor: float = -5.0
    """Smallest log-decay of a step with the bounded gate; below 0."""
    max_beta: float = 1.0
    """Largest strength; 2 allows negative eigenvalues."""
    conv: int = 4
    """Taps of the short convolution; 0 leaves it out."""
    eps: float = 1e-5
    """Of the output norm."""
    gate_bias: bool = added(False)
    """Of the output gate: absent in the paper and its models, present in flash-linear-attention's."""

    def __post_init__(self) -> None:
        if self.floor >= 0:
            raise ConfigError(f"floor is {self.floor}; kda's smallest log-decay must be below 0")

    def sizes(self, d_model: int) -> Sizes:
        keys = self.key_dim or divide_heads("kda", d_model, self.heads)
        return Sizes(self.heads, self.heads, keys, self.value_dim or keys)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        _, heads, keys, values = self.sizes(d_model)
        widths = {"k": heads * keys, "v": heads * values, "beta": heads}
        parts = {name: Linear(d_model, w, precision=precision, rngs=rngs) for name, w in widths.items()}
        return Streams(parts | {"decay": LowRank(d_model, values, heads * keys, precision=precision, rngs=rngs)})

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "KDACell":
        _, heads, keys, values = sizes = self.sizes(d_model)
        width = heads * (2 * keys + values)
        conv = ShortConvolution(width, self.conv, precision=precision, rngs=rngs) if self.conv else None
        if self.gate == "softplus":
            gate = DecayGate(heads, heads * keys, precision=precision, rngs=rngs)
        else:
            gate = BoundedGate(heads, heads * keys, self.floor, precision=precision, rngs=rngs)
        return KDACell(sizes, conv, gate, self.max_beta)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        return Readout(
            heads * values,
            d_model,
            site,
            groups=heads,
            gate=LowRank(d_model, values, heads * values, precision=precision, rngs=rngs, bias=self.gate_bias),
            activation="sigmoid",
            eps=self.eps,
            precision=precision,
            rngs=rngs,
        )


class BoundedGate(nnx.Module):
    """g = floor * sigmoid(exp(a_log) (x + dt_bias)): between the floor and 0, so that exponents stay small."""

    def __init__(self, heads: int, channels: int, floor: float, *, precision: Precision, rngs: nnx.Rngs):
        self.a_log = parameter(jnp.zeros(heads, precision.param), (None,), decay=False)
        self.dt_bias = parameter(start_of_dt(channels, precision, rngs), (None,), decay=False)
        self.floor = floor

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T H K"]:
        shifted = heads_of(x.astype(jnp.float32) + self.dt_bias[...][None, None], self.a_log.shape[0])
        return self.floor * jax.nn.sigmoid(jnp.exp(self.a_log[...])[None, None, :, None] * shifted)


class KDACell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution | None, gate: BoundedGate | DecayGate, max_beta: float):
        super().__init__(sizes, conv)
        self.gate = gate
        self.max_beta = max_beta

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        _, heads, keys, _ = self.sizes
        q, k, v = (heads_of(streams[name], heads) for name in ("q", "k", "v"))
        beta = strength(streams["beta"], self.max_beta)
        raw = streams["decay"]
        log_decay = (
            self.gate(raw) if isinstance(self.gate, BoundedGate) else self.gate(heads_of(self.gate.dt(raw), heads))
        )
        return Recurrence(unit(q) * keys**-0.5, unit(k), v, log_decay, beta, beta)
