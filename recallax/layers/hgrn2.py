"""HGRN2: an outer-product memory whose key is what its forget gate lets go, with a floor that rises with depth.

    f_t = l + (1 - l) sigmoid(x_t W_f),   S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T,   o_t = S_t^T silu(x_t W_q)
    y_t = W_o rms(o_t)   over the full width

The floors l are a cumulative softmax over the model's layers, 0 in the first, which the model owns and learns
(`recallax.models.coupling`); a mixer alone keeps the value at which that softmax starts, i / n in layer i of n.
State: K V float32 per head.
Source: Qin et al. 2024 (HGRN2, arXiv 2404.07904), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import added
from recallax.layers.base import Site, Statistic
from recallax.layers.continuation import divide_heads
from recallax.layers.dense import Linear, Streams
from recallax.layers.gates import heads_of
from recallax.layers.matrix_memory import MatrixCell, Recurrence
from recallax.layers.memory import MemoryConfig, Sizes
from recallax.layers.readout import Readout
from recallax.types import Precision


@dataclass(frozen=True, kw_only=True)
class HGRN2(MemoryConfig):
    """A gated outer-product memory with tied key and forget gate."""

    heads: int = 4
    """The published models take d_model / 128."""
    eps: float = added(1e-5)
    """Of the output norm."""

    def sizes(self, d_model: int) -> Sizes:
        width = divide_heads("hgrn2", d_model, self.heads)
        return Sizes(self.heads, self.heads, width, width)

    def writer(self, d_model: int, *, precision: Precision, rngs: nnx.Rngs) -> Streams:
        return Streams({name: Linear(d_model, d_model, precision=precision, rngs=rngs) for name in ("decay", "v")})

    def cell(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> "HGRN2Cell":
        return HGRN2Cell(self.sizes(d_model), site)

    def readout(self, d_model: int, site: Site, *, precision: Precision, rngs: nnx.Rngs) -> Readout:
        return Readout(d_model, d_model, site, groups=1, gate=None, eps=self.eps, precision=precision, rngs=rngs)


class HGRN2Cell(MatrixCell):
    """See the head of the file."""

    def __init__(self, sizes: Sizes, site: Site):
        super().__init__(sizes)
        start = jnp.asarray(site.index, jnp.float32) / site.depth
        self.floor = Statistic(jnp.broadcast_to(start, (sizes.heads * sizes.keys,)))

    def recurrence(self, streams: Mapping[str, Float[Array, "B T W"]], positions: Int[Array, "B T"]) -> Recurrence:
        heads = self.sizes.heads
        gate = heads_of(streams["decay"].astype(jnp.float32), heads)
        v = heads_of(streams["v"], heads)
        floor = jnp.broadcast_to(self.floor[...].reshape(heads, -1), gate.shape)
        # log f, without rounding f to 0 or 1 first
        keep = jnp.logaddexp(jnp.log(jnp.maximum(floor, 1e-37)), jnp.log1p(-floor) + jax.nn.log_sigmoid(gate))
        k = ((1 - floor) * jax.nn.sigmoid(-gate)).astype(v.dtype)
        return Recurrence(jax.nn.silu(heads_of(streams["q"], heads)), k, v, log_decay=jnp.minimum(keep, 0))
