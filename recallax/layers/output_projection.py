"""From what is read of a memory to the residual stream: a norm per group of channels, a gate, an output projection.

gate last:   y = W_o [ rms(o) * f(g) ]         gate first:   y = W_o [ rms(o * f(g)) ]      g = x W_g
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recallax.layers.base import LayerInfo
from recallax.layers.dense import Linear, LowRank, parameter, residual_std
from recallax.layers.norm import rms_norm
from recallax.types import Precision

type NormGateOrder = Literal["gate_last", "gate_first", "no_norm"]
type GateActivation = Literal["silu", "sigmoid"]
GATE_ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class OutputProjection(nnx.Module):
    """See the head of the file. `num_groups` of channels are normalised apart; one scale for all groups, or one each."""

    def __init__(
        self,
        in_features: int,
        d_model: int,
        layer: LayerInfo,
        *,
        num_groups: int,
        gate: Linear | LowRank | None,
        precision: Precision,
        rngs: nnx.Rngs,
        activation: GateActivation = "silu",
        order: NormGateOrder = "gate_last",
        shared_scale: bool = True,
        norm_eps: float = 1e-5,
    ):
        self.num_groups, self.order, self.activation, self.norm_eps = num_groups, order, activation, norm_eps
        self.dtype = precision.compute
        self.gate = gate
        width = in_features // num_groups
        ones = jnp.ones((width,) if shared_scale else (num_groups, width), precision.param)
        self.scale = None if order == "no_norm" else parameter(ones, (None,) * ones.ndim, weight_decay=False)
        self.out = Linear(
            in_features,
            d_model,
            precision=precision,
            rngs=rngs,
            std=residual_std(layer.num_layers),
            axes=("heads", "embed"),
        )

    def __call__(self, o: Float[Array, "*batch H V"], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        batch = x.shape[:-1]
        y = o.reshape(*batch, -1).astype(jnp.float32)
        gate = 1.0 if self.gate is None else GATE_ACTIVATIONS[self.activation](self.gate(x).astype(jnp.float32))
        if self.order == "gate_last":
            y = self._norm(y) * gate
        elif self.order == "gate_first":
            y = self._norm(y * gate)
        else:
            y = y * gate
        return self.out(y.astype(self.dtype))

    def _norm(self, y: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        assert self.scale is not None
        return rms_norm(
            y.reshape(*y.shape[:-1], self.num_groups, -1), self.scale[...], self.norm_eps, jnp.float32
        ).reshape(y.shape)
