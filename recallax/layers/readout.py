"""From what is read of a memory to the residual stream: a norm per group of channels, a gate, an output projection.

gate last:   y = W_o [ rms(o) * f(g) ]         gate first:   y = W_o [ rms(o * f(g)) ]      g = x W_g
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import Site
from recallax.layers.dense import Linear, LowRank, parameter, residual_std
from recallax.layers.norm import rms
from recallax.types import Precision

type Order = Literal["gate last", "gate first", "no norm"]
type Activation = Literal["silu", "sigmoid"]
ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class Readout(nnx.Module):
    """See the head of the file. `groups` of channels are normalised apart; one scale for all groups, or one each."""

    def __init__(
        self,
        inner: int,
        d_model: int,
        site: Site,
        *,
        groups: int,
        gate: Linear | LowRank | None,
        precision: Precision,
        rngs: nnx.Rngs,
        activation: Activation = "silu",
        order: Order = "gate last",
        shared_scale: bool = True,
        eps: float = 1e-5,
    ):
        self.groups, self.order, self.activation, self.eps = groups, order, activation, eps
        self.dtype = precision.compute
        self.gate = gate
        width = inner // groups
        ones = jnp.ones((width,) if shared_scale else (groups, width), precision.param)
        self.scale = None if order == "no norm" else parameter(ones, (None,) * ones.ndim, decay=False)
        self.out = Linear(
            inner, d_model, precision=precision, rngs=rngs, std=residual_std(site.depth), axes=("heads", "embed")
        )

    def __call__(self, o: Float[Array, "*batch H V"], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        batch = x.shape[:-1]
        y = o.reshape(*batch, -1).astype(jnp.float32)
        gate = 1.0 if self.gate is None else ACTIVATIONS[self.activation](self.gate(x).astype(jnp.float32))
        if self.order == "gate last":
            y = self._norm(y) * gate
        elif self.order == "gate first":
            y = self._norm(y * gate)
        else:
            y = y * gate
        return self.out(y.astype(self.dtype))

    def _norm(self, y: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        assert self.scale is not None
        return rms(y.reshape(*y.shape[:-1], self.groups, -1), self.scale[...], self.eps, jnp.float32).reshape(y.shape)
