"""Mamba-2: a state-space model that is linear attention with a decay per token and head.

    S_t = exp(-exp(a) dt_t) S_{t-1} + B_t (dt_t x_t)^T,   o_t = S_t^T C_t + D x_t,   dt_t = softplus(u_t W_dt + b)
    x, B, C = silu(conv(u W) + bias);   y_t = W_o rms(o_t * silu(u_t W_z))   per group

B and C (keys and queries, width N) are shared by the heads of a group. State: N P float32 per head, P the head's width,
and the last 3 inputs of the convolution. Projections start as PyTorch's do, as in the authors' code: at widths below a
few hundred a deviation of .02 is too small for it to learn in a few thousand steps.
Source: Dao & Gu 2024 (arXiv 2405.21060), sections 5 and 7.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import ConfigError
from recallax.layers.base import Site
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams, parameter, torch_std
from recallax.layers.gates import DecayGate, heads_of
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.readout import Order, Readout
from recallax.layers.short_convolution import ShortConvolution
from recallax.layers.step_filter import Filtered
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class Mamba2(MemoryConfig):
    """State-space duality with one decay per head."""

    state_dim: int = 128
    """N: width of B and C."""
    head_dim: int = 64
    """P: width of a head; the heads are inner / P in number."""
    groups: int = 1
    """Groups of heads that share B and C, and of channels that are normalised together."""
    expand: int = 2
    inner: int | None = None
    """Width of all heads together; None is expand * d_model."""
    conv: int = 4
    order: Order = "gate first"
    dt_limit: tuple[float, float | None] = (0.0, None)
    """Step sizes are clipped to this range; None is no upper limit."""
    eps: float = 1e-5
    """Of the output norm."""

    def __post_init__(self) -> None:
        if self.conv < 1:
            raise ConfigError(f"conv is {self.conv}; mamba2 needs at least 1 tap")
        low, high = self.dt_limit
        if low < 0 or (high is not None and high <= low):
            raise ConfigError(f"dt_limit is {self.dt_limit}; it must be a range of step sizes from 0 up")

    def sizes(self, d_model: int) -> Sizes:
        inner = self.inner or self.expand * d_model
        if inner % self.head_dim:
            raise ConfigError(f"head_dim is {self.head_dim}; it must divide mamba2's inner width {inner}")
        heads = inner // self.head_dim
        divide_heads("mamba2's heads over groups", heads, self.groups)
        return Sizes(self.groups, heads, self.state_dim, self.head_dim)

    def query(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        width, std = self.groups * self.state_dim, torch_std(d_model)
        return Streams({"q": Linear(d_model, width, std=std, precision=precision, rngs=rngs)})

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        groups, heads, keys, values = self.sizes(d_model)
        widths = {"k": groups * keys, "v": heads * values, "dt": heads}
        std = torch_std(d_model)
        parts = {name: Linear(d_model, w, std=std, precision=precision, rngs=rngs) for name, w in widths.items()}
        return Streams(parts)

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "Mamba2Cell":
        groups, heads, keys, values = sizes = self.sizes(d_model)
        width = 2 * groups * keys + heads * values
        conv = ShortConvolution(width, self.conv, precision=precision, rngs=rngs, bias=True)
        low, high = self.dt_limit
        limit = (float(low), float("inf" if high is None else high))
        gate = DecayGate(heads, heads, precision=precision, rngs=rngs, limit=limit)
        return Mamba2Cell(sizes, conv, gate, precision)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        _, heads, _, values = self.sizes(d_model)
        return Readout(
            heads * values,
            d_model,
            site,
            groups=self.groups,
            gate=Linear(d_model, heads * values, std=torch_std(d_model), precision=precision, rngs=rngs),
            order=self.order,
            shared_scale=False,
            eps=self.eps,
            precision=precision,
            rngs=rngs,
        )


class Mamba2Cell(MatrixCell, Filtered):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, conv: ShortConvolution, gate: DecayGate, precision: Precision):
        super().__init__(sizes, conv)
        self.gate = gate
        self.d = parameter(jnp.ones(sizes.heads, precision.param), (None,), decay=False)

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        groups, heads, _, _ = self.sizes
        q, k = (heads_of(streams[name], groups) for name in ("q", "k"))
        x = heads_of(streams["v"], heads)
        dt = self.filtered(self.gate.dt(streams["dt"]))
        v = (x.astype(jnp.float32) * dt[..., None]).astype(x.dtype)
        return Recurrence(q, k, v, log_decay=self.gate(dt))

    def rates(self) -> Float[Array, " H"]:
        return jnp.exp(self.gate.a_log[...].astype(jnp.float32))

    def read(self, y: Float[Array, "B T H V"], streams: Mapping[str, Float[Array, "B T W"]]) -> Float[Array, "B T H V"]:
        x = heads_of(streams["v"], self.sizes.heads).astype(jnp.float32)
        return (y.astype(jnp.float32) + self.d[...][None, None, :, None] * x).astype(y.dtype)
